"""The official JavaScript client, where Node is present."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "js"


@pytest.mark.skipif(not shutil.which("node") or not shutil.which("npm"), reason="Node.js is not installed")
@pytest.mark.parametrize(("file", "num_tests"), [("client.test.mjs", 6), ("generation.test.mjs", 10), ("tools.test.mjs", 13)])
def test_the_javascript_client(base_url, file, num_tests):
    if not all((FOLDER / "node_modules" / name).is_dir() for name in ("openai", "zod")):
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"], cwd=FOLDER, check=True, timeout=300)
    environ = {**os.environ, "LLMSERVE_URL": base_url}
    command = ["node", "--test", "--test-reporter=tap", file]
    result = subprocess.run(command, cwd=FOLDER, env=environ, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"# pass {num_tests}\n" in result.stdout
