"""Train and evaluate SimCLR.

    python examples/train                                      # photographs, a minute on a CPU
    python examples/train --recipe cifar10_resnet18            # 100 epochs, on a GPU
    python examples/train --data imagefolder --root PATH       # PATH/train/CLASS/*.jpg, PATH/test/…
    python examples/train --resume runs/RUN                    # continue an interrupted run
    torchrun --nproc-per-node 8 examples/train --recipe imagenet_resnet50 --root PATH

A recipe is a file in examples/train/recipes or of your own; each of its values is an option of the
command line too (--help). docs/training.md has the rest.
"""

import os
import sys
from pathlib import Path

# Read when torch loads: threads that wait asleep. Where other programs use the same cores,
# threads that wait busily make a step several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path[0] = str(Path(__file__).parents[1])  # `python FOLDER` puts the folder itself there

from train.config import UserError
from train.run import main

if __name__ == "__main__":  # not in a worker process, which imports this file too
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
