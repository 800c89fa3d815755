"""Without PyTorch the package says which extra installs it, and nothing else needs it."""

import subprocess
import sys

HIDE = "import sys; sys.modules['torch'] = None; import tvmstruct; "


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_extra_is_named() -> None:
    found = run(HIDE + "tvmstruct.training")
    assert found.returncode == 1
    message = "tvmstruct.training needs PyTorch: pip install tvmstruct[torch]"
    assert found.stderr.strip().endswith("MissingDependencyError: " + message)


def test_plans_and_counts_do_without() -> None:
    code = "from tvmstruct.recurrent_forms import antman, zero_layer; "
    code += "print(zero_layer('lstm', 80, 10, *antman('lgp_shuffle', g_im=10, g_hm=2)).macs)"
    assert run(HIDE + code).stdout.strip() == str(320 + 200)
