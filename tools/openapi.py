#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""Writes proto/openapi.json from proto/openapi.yaml; with --check says whether it is up to date (exit 1 if not)."""
import json
import pathlib
import sys

import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent / "proto"


def text():
    with open(ROOT / "openapi.yaml", encoding="utf-8") as f:
        return json.dumps(yaml.safe_load(f), indent=1, ensure_ascii=False) + "\n"


def main():
    target = ROOT / "openapi.json"
    if sys.argv[1:] == ["--check"]:
        if target.exists() and target.read_text(encoding="utf-8") == text():
            return 0
        print("proto/openapi.json is not what proto/openapi.yaml says: run tools/openapi.py", file=sys.stderr)
        return 1
    target.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
