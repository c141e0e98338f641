"""How much of something that a mount has little of one user may hold, so that the others have theirs.

A user may hold as much as is left for the others: one user gets half, a second one who comes then a quarter, and so on. So no user needs a number of
their own, and none finds nothing left. Root and the mount's owner are neither counted nor refused here.
"""

import os


class Shares:
    """The shares of one thing. All ordinary users together hold less than `limit` of it. Beyond a share, the error is `errno`."""

    def __init__(self, limit: int, errno: int) -> None:
        self._errno = errno
        self._privileged = frozenset((0, os.geteuid()))
        self.held: dict[int, int] = {}
        """How many each ordinary user holds who holds any."""
        self.free = limit
        """How many are left."""

    def check(self, uid: int) -> None:
        """Raises OSError when the user has their share already."""
        if self.is_used_up(uid):
            raise self.error()

    def is_used_up(self, uid: int) -> bool:
        """Whether the user has their share already."""
        return self.held.get(uid, 0) >= self.free and uid not in self._privileged

    def error(self) -> OSError:
        """The error of a user who has their share already."""
        return OSError(self._errno, os.strerror(self._errno))

    def take(self, uid: int) -> None:
        """The user takes one. Raises OSError, and takes none, when the user has their share already."""
        self.check(uid)
        self.change(uid, 1)

    def give_back(self, uid: int) -> None:
        """The user gives one back."""
        self.change(uid, -1)

    def change(self, uid: int, number: int) -> None:
        """The user holds so many more (or less) now. This refuses nothing."""
        if uid in self._privileged:
            return
        self.free -= number
        held = self.held.get(uid, 0) + number
        if held:
            self.held[uid] = held
        else:
            self.held.pop(uid, None)
