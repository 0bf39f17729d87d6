# SPDX-License-Identifier: MIT
"""tools/emoji_pictures.py, where its packages are installed: what the colour model is trained on."""
import pathlib
import struct
import subprocess

import pytest

from conftest import BINARY, ROOT, SCALE, clean_env

FONT = pathlib.Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LIST = pathlib.Path("/usr/share/unicode/emoji/emoji-test.txt")
pytest.importorskip("fontTools")
pytest.importorskip("PIL")
pytestmark = pytest.mark.skipif(not FONT.exists() or not LIST.exists(), reason="fonts-noto-color-emoji and unicode-data are not installed")


def sign(path):
    """Its code points without skin tones and presentation."""
    return tuple(c for c in path.stem.split("-") if c not in ("fe0f", "1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"))


def test_pictures_of_emoji_are_data_to_train_on(tmp_path):
    subprocess.run([ROOT / "tools/emoji_pictures.py", tmp_path], check=True, capture_output=True, timeout=120 * SCALE)
    train, test = (sorted((tmp_path / part).glob("*/*.png")) for part in ("train", "test"))
    assert len(train) > 2500 and 0.05 < len(test) / len(train) < 0.2
    assert not {sign(p) for p in train} & {sign(p) for p in test}
    kinds = sorted({p.parent.name for p in train})
    assert kinds == sorted({p.parent.name for p in test}) and len(kinds) == 10
    for png in train[::100]:
        assert struct.unpack(">IIBB", png.read_bytes()[16:26]) == (32, 32, 8, 2)
    done = subprocess.run([BINARY, "train", "--config", ROOT / "deploy/recipes/emoji-sit.conf", "--data", tmp_path / "train", "--check-config"], capture_output=True, text=True, env=clean_env())
    assert done.returncode == 0 and f"fine: {len(train)} examples" in done.stdout, done.stderr
