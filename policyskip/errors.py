"""The one exception for what a user can cause and put right."""


class UserError(ValueError):
    """Bad input. Its message says what was given and what is allowed; the command line prints it and exits with 2."""
