"""Makes common.py and engine/ importable for the scripts in this folder, wherever they are started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
