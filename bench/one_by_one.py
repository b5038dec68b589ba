"""The messenger with groups of one: each message is committed alone. Only for comparison."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import messenger
from plumbing import groups

if __name__ == "__main__":
    groups.GROUP_SIZE_MAX = 1
    sys.exit(messenger.main())
