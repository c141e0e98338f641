"""Real programs of the system. They map files and fork. The files at the end must be equal; mappings ask when touched."""

import os
import subprocess
import tarfile
from collections.abc import Callable, Sequence

from fusehsm.conform.scene import MIB, SIZE, Scene
from fusehsm.conform.workload import Workload

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def run(directory: str, command: Sequence[str]) -> tuple[int, bytes]:
    done = subprocess.run(
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": "/nonexistent", "TZ": "UTC"},
        check=False,
    )
    return done.returncode, done.stdout.replace(directory.encode(), b".")


def some_files(scene: Scene) -> None:
    """Three files, one of them text."""
    scene.file("file", SIZE)
    scene.file("large", 3 * MIB)
    text = "one\ntwo\nthree\n" * 3000
    (scene.backing / "text").write_text(text)
    (scene.backing / "changed").write_text(text[:-2] + "f\n")


def a_tree(scene: Scene) -> None:
    """A file in a directory in a directory."""
    (scene.backing / "tree" / "below").mkdir(parents=True)
    scene.file("tree/below/file")


def an_archive(scene: Scene) -> None:
    """A file in an archive."""
    path = scene.file()
    os.utime(path, (1, 1))
    with tarfile.open(scene.backing / "archive.tar", "w") as archive:
        archive.add(path, "unpacked")


def sources(scene: Scene) -> None:
    """Sources for a compiler."""
    (scene.backing / "main.c").write_text('#include "part.h"\nint main(void) { return PART; }\n')
    (scene.backing / "part.h").write_text("#define PART 0\n")
    (scene.backing / "script.py").write_text("import module\nprint(module.VALUE)\n")
    (scene.backing / "module.py").write_text("VALUE = 7\n")


def old_sources(scene: Scene) -> None:
    """Sources with an old modification time: git reads files that are as new as its index again and again."""
    sources(scene)
    for file in scene.backing.iterdir():
        os.utime(file, (1, 1))


def database(scene: Scene) -> None:
    """A small database."""
    subprocess.run(
        ["sqlite3", str(scene.backing / "data.db"), "create table t(a, b); insert into t values (1, 'x');"],
        check=True,
    )


def row(
    name: str,
    make: Callable[[Scene], None],
    *command: str,
    differs: str | tuple[str, ...] = (),
    programs: tuple[str, ...] = (),
) -> Workload:
    """A workload: the command runs in a directory that `make` has filled, while a listener hears all. The content of all files is noted.

    `programs`: those that the command runs.
    """

    async def script(scene: Scene) -> None:
        make(scene)
        listener = await scene.listen(scene.everywhere())
        await scene.call(run, str(scene.path), command, what=" ".join(command))
        listener.close()
        for left in sorted(scene.backing.rglob("*")):
            if left.is_file() and not left.is_symlink() and left.name not in _CHANGING:
                scene.say("afterwards", f"{left.relative_to(scene.backing)} holds", left.read_bytes())

    return Workload("programs", name, script, differs, programs=(command[0], *programs))


_CHANGING = ("index",)  # git's index contains the files' times and inode numbers
EMPTY = "empty reads and writes"
WORKLOADS = [
    row("cat", some_files, "cat", "file", "large"),
    row("cat to a file", some_files, "sh", "-c", "cat file large > both", differs=EMPTY, programs=("cat",)),
    row("cp", some_files, "cp", "large", "copy", differs=EMPTY),
    row("cp, always sparse", some_files, "cp", "--sparse=always", "large", "copy"),
    row("cp of a tree", a_tree, "cp", "-a", "tree", "copy", differs=EMPTY),
    row("cp, never sparse", some_files, "cp", "--sparse=never", "file", "copy", differs=EMPTY),
    row("cp, cloning if it can", some_files, "cp", "--reflink=auto", "file", "copy", differs=EMPTY),
    row("mv", some_files, "mv", "file", "moved"),
    row("ln", some_files, "ln", "file", "link"),
    row("rm", some_files, "rm", "file"),
    row("dd", some_files, "dd", "if=large", "of=out", "bs=100000", "count=3", "skip=2", "status=none"),
    row("dd within", some_files, "dd", "if=file", "of=large", "conv=notrunc", "bs=7000", "status=none"),
    row("dd direct", some_files, "dd", "if=large", "of=out", "iflag=direct", "bs=65536", "status=none"),
    row("head", some_files, "head", "-c", "100", "large"),
    row("tail", some_files, "tail", "-c", "100", "large"),
    row("wc", some_files, "wc", "text"),
    row("sha256sum", some_files, "sha256sum", "file", "large"),
    row("cmp", some_files, "cmp", "file", "large"),
    row("diff", some_files, "diff", "-q", "text", "changed"),
    row("grep", some_files, "grep", "-c", "two", "text"),
    row("grep -r", some_files, "grep", "-rlc", "three", "text"),
    row("sed", some_files, "sed", "-n", "5p", "text"),
    row("sed -i", some_files, "sed", "-i", "s/two/2/", "text"),
    row("sort", some_files, "sort", "-u", "text"),
    row("truncate", some_files, "truncate", "-s", "5000", "file"),
    row("touch", some_files, "touch", "-d", "2020-01-01", "file"),
    row("ls", some_files, "ls", "-R"),
    row(
        "tar",
        some_files,
        "tar",
        "cf",
        "out.tar",
        "--mtime=2020-01-01",
        "--owner=0",
        "--group=0",
        "--sort=name",
        "file",
        "text",
    ),
    row(
        "tar to a pipe",
        some_files,
        "sh",
        "-c",
        "tar cf - --mtime=2020-01-01 file | wc -c",
        programs=("tar", "wc"),
    ),
    row("tar, unpacking", an_archive, "tar", "xf", "archive.tar"),
    row("gzip", some_files, "gzip", "-nk", "text"),
    row("perl", some_files, "perl", "-ne", "$n++; END { print $n }", "text"),
    row("sh", some_files, "sh", "-c", "exec < text; read one; read two; echo $one $two"),
    row("sqlite, reading", database, "sqlite3", "data.db", "select * from t"),
    row("sqlite, writing", database, "sqlite3", "data.db", "insert into t values (2, 'y'); select * from t"),
    row("python", sources, "/usr/bin/python3", "-S", "-E", "-B", "script.py"),
    row("gcc", sources, "gcc", "-c", "main.c"),
    row(
        "git",
        old_sources,
        "sh",
        "-c",
        "git init -q . && git add . && git status --short",
        programs=("git",),
    ),
    row(
        "git, committing",
        old_sources,
        "sh",
        "-c",
        "export GIT_AUTHOR_DATE=@1 GIT_COMMITTER_DATE=@1; git init -q . && git add . && "
        "git -c user.name=n -c user.email=e commit -qm message && git log --oneline && git diff",
        programs=("git",),
    ),
]
