"""The Vercel AI SDK, where Node is present."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "js"


@pytest.mark.skipif(not shutil.which("node") or not shutil.which("npm"), reason="Node.js is not installed")
def test_the_vercel_ai_sdk(documented):
    if not (FOLDER / "node_modules" / "ai").is_dir():
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"], cwd=FOLDER, check=True, timeout=300)
    environ = {**os.environ, "MODEL": documented("Vercel AI SDK")}
    command = ["node", "--test", "--test-reporter=tap", "ai-sdk.test.mjs"]
    result = subprocess.run(command, cwd=FOLDER, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "# pass 5\n" in result.stdout
