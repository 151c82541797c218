"""What the commands report by an exit status of its own."""


class RejectedError(Exception):
    """An image was rejected where all of them have to be good."""
