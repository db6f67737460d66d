"""The error of an argument that breaks a rule, which the command line words anew."""


class BadArgumentError(ValueError):
    """An argument breaks a rule.

    Attributes:
        argument: the name of the argument; the command line says the flag of that name instead.
        rule: the rest of the message: the rule, what came, and what to do.
    """

    def __init__(self, argument: str, rule: str):
        super().__init__(argument, rule)
        self.argument = argument
        self.rule = rule

    def __str__(self) -> str:
        return f"{self.argument} {self.rule}"
