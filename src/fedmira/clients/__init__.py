"""One client's work, or a whole cohort's; it knows no transport and no rounds."""

from fedmira.clients.cohort import Cohort, CohortSettings

__all__ = ["Cohort", "CohortSettings"]
