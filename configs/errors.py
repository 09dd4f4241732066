"""What a user can get wrong, said in one sentence of cause and one of cure."""


class UserError(Exception):
    """A wrong request or a damaged input that the user can mend; shown without a traceback.

    `cause` says what was seen and what was expected, `cure` what to do. `exit_code` is 2 for a wrong
    request (a bad path, key or value) and 1 for work that failed (damaged data, a full disk).
    """

    def __init__(self, cause: str, cure: str, exit_code: int = 2) -> None:
        super().__init__(f"{cause} {cure}")
        self.cause = cause
        self.cure = cure
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type, tuple[str, str, int]]:
        """Survive the trip out of a worker process."""
        return type(self), (self.cause, self.cure, self.exit_code)


class ConfigError(UserError):
    """A config file, key or value that is wrong."""
