"""What a workload is: a name, a script that runs in a scene, and which known divergence shows in it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fusehsm.conform.divergences import DIVERGENCES
from fusehsm.conform.scene import EVERYTHING, SIZE, Scene

Script = Callable[[Scene], Awaitable[None]]
_KNOWN = frozenset(entry.name for entry in DIVERGENCES)


@dataclass(frozen=True, slots=True)
class Workload:
    """Runs the same on both sides.

    `differs`: the entries of conform/divergences.py that explain why the emulator's stream is another one, none where it must be the same.
    `unsteady`: the events change from run to run; what calls return and files hold does not.
    What is arbitrary on the real kernel too: `interchangeable` groups hear the same event one after the other, which first; `at_once`: events
    between one result and the next come in any order.
    """

    family: str
    name: str
    script: Script
    differs: str | tuple[str, ...] = ()
    interchangeable: tuple[str, ...] = ()
    at_once: bool = False
    unsteady: bool = False
    needs_root: bool = False

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
        """Its name everywhere: "family/name", without what a shell would not take as it is."""
        return f"{self.family}/{self.name}".replace(" ", "-").replace("'", "")


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
    """One accessor does `act(path, *arguments)` to a file of `size` bytes, beside which "other" lies, while a listener hears all of it.

    What the files hold afterwards belongs to the stream.
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
