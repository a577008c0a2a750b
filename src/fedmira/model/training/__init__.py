"""Local training and measuring of a cohort."""
