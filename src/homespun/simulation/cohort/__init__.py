"""The cohort engine: the local training of many clients as one program."""
