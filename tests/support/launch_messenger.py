"""Starts the messenger, which is as it is but for its patience."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import messenger
from support import patience

patience.begin()
messenger.__file__ = os.path.abspath(__file__)  # by which the parent starts its workers
sys.exit(messenger.main())
