"""What a workload is: a name, a script that runs in a scene, and which known divergence shows in it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fusehsm.conform.scene import EVERYTHING, SIZE, Scene
from fusehsm.divergences import DIVERGENCES

Script = Callable[[Scene], Awaitable[None]]
_KNOWN = frozenset(entry.name for entry in DIVERGENCES)


@dataclass(frozen=True, slots=True)
class Workload:
    """Runs the same on both sides.

    `differs`: the entries of divergences.py that explain why the emulator's stream is another one, none where it must be the same.
    `in_any_order`: the events' order is arbitrary, on the real kernel too. `unsteady`: the streams change from run to run.
    """

    family: str
    name: str
    script: Script
    differs: str | tuple[str, ...] = ()
    in_any_order: bool = False
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
        """Its name everywhere: "family/name", without blanks."""
        return f"{self.family}/{self.name}".replace(" ", "-")


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

    return Workload(family, name, script, differs, needs_root=needs_root)
