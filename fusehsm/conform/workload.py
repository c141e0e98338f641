"""The definition of a workload: a name, a script that runs in a scene, and the known divergences that it shows."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from fusehsm.conform.divergences import DIVERGENCES
from fusehsm.conform.scene import EVERYTHING, SIZE, Scene

Script = Callable[[Scene], Awaitable[None]]
_KNOWN = frozenset(entry.name for entry in DIVERGENCES)


@dataclass(frozen=True, slots=True)
class Need:
    """Something that older kernels lack, or that a system may forbid. A try on a plain file shows whether it is there, not the kernel's version."""

    #: What it is, for people.
    name: str
    #: A function for an accessor, called with the path of a file and `arguments`.
    act: Callable[..., object]
    arguments: tuple[object, ...]
    #: Whether the act's result, or the OSError that it raised, shows that it is lacking.
    lacking: Callable[[object], bool]


@dataclass(frozen=True, slots=True)
class Workload:
    """A small program that runs in the same way on both sides."""

    #: The family, the first part of the key.
    family: str
    #: The name in the family. It is a key of recordings, so it stays.
    name: str
    script: Script
    #: The names of the divergences that explain another stream of the emulator; empty: the streams must be equal.
    differs: str | tuple[str, ...] = ()
    #: Groups that hear the same event one after the other, in an order that is arbitrary on the real kernel too.
    interchangeable: tuple[str, ...] = ()
    #: The events between one result and the next come in any order, on the real kernel too.
    at_once: bool = False
    #: The events change from run to run; the results of calls and the content of files do not.
    unsteady: bool = False
    #: The workload runs only as root.
    needs_root: bool = False
    #: What the kernel must have for this workload.
    needs: Need | None = None
    #: The programs and files of this machine that the workload uses: names in the PATH, or absolute paths.
    programs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.divergences:
            if name not in _KNOWN:
                raise ValueError(f"{self.key}: no divergence is called {name}")

    @property
    def divergences(self) -> tuple[str, ...]:
        """`differs`, always as a tuple."""
        return (self.differs,) if isinstance(self.differs, str) else self.differs

    @property
    def key(self) -> str:
        """The name in commands and recordings: "family/name", without spaces and quotation marks."""
        return f"{self.family}/{self.name}".replace(" ", "-").replace("'", "")


def needing(need: Need, workload: Workload) -> Workload:
    """The workload, which needs this of the kernel."""
    return replace(workload, needs=need)


def one_call(
    family: str,
    name: str,
    act: Callable[..., object] | str,
    *arguments: object,
    size: int = SIZE,
    mode: int = 0o644,
    mask: int = EVERYTHING,
    differs: str | tuple[str, ...] = (),
    needs_root: bool = False,
    unsteady: bool = False,
) -> Workload:
    """A workload of one call: an accessor runs `act(path, *arguments)` on a file of `size` bytes while a listener hears all events of `mask`.

    There is a second file, "other", of the same size. The content of both at the end belongs to the stream.
    """

    async def script(scene: Scene) -> None:
        path = scene.file(size=size, mode=mode)
        scene.file("other", size=size)
        listener = await scene.listen(scene.everywhere(mask))
        await scene.call(act, path, *arguments, what=name)
        listener.close()
        for left in ("file", "other"):
            if (scene.backing / left).exists():
                scene.say("afterwards", f"{left} holds", scene.content(left))

    return Workload(family, name, script, differs, needs_root=needs_root, unsteady=unsteady)
