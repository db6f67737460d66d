"""Repositories whose models are in no package index: they are imported from the user's own checkouts."""

import argparse
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Repository:
    """A repository on GitHub.

    Attributes:
        owner: its owner.
        name: its name.
        root: the folder in it that its modules are imported from.
        model: the module that is measured, a file under ``root`` by which a checkout is known.
        requires: the packages that the module imports, as pip spells them.
    """

    owner: str
    name: str
    root: str
    model: str
    requires: str

    def how_to_get_it(self) -> str:
        """Return the commands that make a checkout and install what it imports, and the argument for it."""
        return (
            f"git clone https://github.com/{self.owner}/{self.name} ../{self.name} && "
            f"pip install {self.requires}, then pass --source ../{self.name}"
        )


REPOSITORIES = {  # by their files in benchmarks/adopted
    "jax_llm_examples": Repository(
        owner="jax-ml",
        name="jax-llm-examples",
        root="llama3",
        model="llama3_jax/model.py",
        requires='-e ".[models]"',
    ),
    "bonsai": Repository(
        owner="jax-ml",
        name="bonsai",
        root=".",
        model="bonsai/models/qwen3/modeling.py",
        requires='-e ".[models]" jaxtyping',
    ),
}


@dataclass(frozen=True)
class Checkout:
    """A checkout of a repository.

    Attributes:
        group: the file in benchmarks/adopted that has its models.
        root: the folder that its modules are imported from.
        commit: the commit that is checked out, with "-dirty" if files differ from it.
    """

    group: str
    root: Path
    commit: str


def read_checkout(folder: str) -> Checkout:
    """Return the checkout in a folder, as an argument of the command line."""
    path = Path(folder).expanduser().resolve()
    for group, repository in REPOSITORIES.items():
        root = path / repository.root
        if (root / repository.model).is_file():
            return Checkout(group, root, _commit(path, repository))
    known = "; ".join(
        f"{each.name} has {Path(each.root, each.model)} ({each.how_to_get_it()})"
        for each in REPOSITORIES.values()
    )
    raise argparse.ArgumentTypeError(f"{folder!r} is no checkout of a known repository. Pass one: {known}.")


def _commit(path: Path, repository: Repository) -> str:
    """Return the commit of a checkout, which the results record."""
    command = ["git", "--git-dir", str(path / ".git"), "--work-tree", str(path)]
    describe = [*command, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except subprocess.CalledProcessError as error:
        raise argparse.ArgumentTypeError(
            f"'{path}' has the files of {repository.name} but no commit, which the results record "
            f"({error.stderr.strip()}). Get it by {repository.how_to_get_it()}."
        ) from error
