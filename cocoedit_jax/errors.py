"""The one error type for bad input: configuration, files, shapes and flags."""


class UserError(ValueError):
    """Input that cannot be used. The message names the field, file or flag, the value found and what was expected."""
