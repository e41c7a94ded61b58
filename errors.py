"""The one exception whose text is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right: one sentence with the cause and the cure, shown without a traceback."""
