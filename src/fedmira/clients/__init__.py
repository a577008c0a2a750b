"""One client's work, or a whole cohort's; it knows no transport and no rounds."""

from fedmira.clients.cohort import Cohort, CohortSettings
from fedmira.clients.replies import address_problem, checked_reply

__all__ = ["Cohort", "CohortSettings", "address_problem", "checked_reply"]
