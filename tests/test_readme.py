"""What README and CONTRIBUTING tell people to type is what is checked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text()
CI = (REPOSITORY / ".ci" / "run").read_text()
PRE_COMMIT = (REPOSITORY / ".pre-commit-config.yaml").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def lint_commands() -> list[str]:
    """The block of CONTRIBUTING.md under "Check", without the tests."""
    check = CONTRIBUTING.split("## Check")[1].split("\n## ")[0]
    return [line for line in blocks(check, "bash")[0].splitlines() if line != "pytest"]


def test_the_example_runs(capsys):
    (example,) = blocks(README, "python")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    gradients = [parameter.grad for parameter in names["model"].parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_there_are_two_commands_and_ci_runs_the_second():
    lines = [line for block in blocks(README, "bash") for line in block.splitlines()]
    installs = [line for line in lines if line.startswith("pip install")]
    assert installs == [
        "pip install -c constraints.txt -e '.[demo]' && detr-fast demo",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]
    (pattern,) = re.findall(r'grep -E "([^"]+)" README\.md', CI)
    assert re.findall(pattern.replace("\\.", "."), README, re.MULTILINE) == [installs[1]]
    assert 'check "$test_command"' in CI


@pytest.mark.parametrize("command", lint_commands())
def test_linters_are_the_same_everywhere(command):
    assert f'check "{command}"' in CI
    assert re.search(rf"^ +entry: {re.escape(command)}$", PRE_COMMIT, re.MULTILINE)


def test_every_option_and_command_of_the_readme_exists():
    from typer.testing import CliRunner

    from detr_fast.cli import app

    text = " ".join(blocks(README, "bash")).replace("\\\n", " ")
    used = [line.split() for line in text.splitlines() if line.strip().startswith("detr-fast ")]
    assert {words[1] for words in used} == {"check-data", "train", "plot", "eval", "predict", "export"}
    for words in used:
        help_text = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200"}).output
        for option in (word for word in words if word.startswith("--")):
            assert option in help_text, f"detr-fast {words[1]} has no {option}"


def test_the_paths_in_the_tree_exist():
    tree = README.split("## The tree")[1].split("```")[1]
    paths = [line.split()[0] for line in tree.splitlines() if line]
    assert paths
    assert [path for path in paths if not (REPOSITORY / path).is_dir()] == []
