"""Train tiny-sdxl from nothing, stage by stage.

    python scripts/train_reference_model.py

runs every stage in order, below work/; names of stages run those. A stage that was stopped goes on from its last checkpoint.
On a GPU all of it takes minutes, on one CPU core about two hours.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from reference_training.stages import STAGES, Training


def main() -> None:
    """Run the stages named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"from {', '.join(STAGES)}; all of them when none is named")
    parser.add_argument("--work", type=Path, default=Path("work"), help="checkpoints and caches (2 GB)")
    parser.add_argument("--steps", type=int, help="the budget of the named stage; its schedule follows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=256, help="held-out prompts that stage evaluate judges")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.stages) - set(STAGES))
    if unknown:
        parser.error(f"no stage is called {unknown[0]}: choose from {', '.join(STAGES)}")
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    training = Training(arguments.work, torch.device(arguments.device), arguments.steps, arguments.prompts)
    for name in arguments.stages or STAGES:
        STAGES[name](training)


if __name__ == "__main__":
    main()
