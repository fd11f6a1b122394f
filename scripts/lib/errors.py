"""Errors that are the user's to mend: where, what, and the way out."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a config, a file or the machine; shown without a traceback.

    `where` names the file, key or path, `what` what was found there, and `hint`
    what would be right.
    """

    def __init__(self, where: str, what: str, hint: str = "") -> None:
        self.where, self.what, self.hint = where, what, hint
        super().__init__(f"{where}: {what}" + (f"\n\nhint: {hint}" if hint else ""))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        """For one that another process raised."""
        return type(self), (self.where, self.what, self.hint)


class RecipeError(UserError):
    """A stage's recipe is not of its form."""


class DataError(UserError):
    """A data file holds what the stage cannot use."""


class AttestError(UserError):
    """A finished stage's files are not what the stage promises."""
