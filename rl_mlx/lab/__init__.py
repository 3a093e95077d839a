"""The quant lab: measure what a quantization costs, see it, and choose.

For people in Jupyter, and behind ``rl-mlx eval`` and ``rl-mlx bench``. The optional packages
(pandas, matplotlib, pyarrow) come with ``pip install 'rl-mlx[lab]'``; they and MLX are imported
where they are used.
"""

from __future__ import annotations

from rl_mlx.lab.calibrated import calibrate
from rl_mlx.lab.compare import Candidate, Comparison, compare
from rl_mlx.lab.divergence import Divergence, divergence
from rl_mlx.lab.measurement import Measurement
from rl_mlx.lab.perplexity import Perplexity, perplexity
from rl_mlx.lab.reference import Reference
from rl_mlx.lab.search import Allocation, allocate
from rl_mlx.lab.sensitivity import Sensitivity, sensitivity
from rl_mlx.lab.tasks import TaskScores, tasks
from rl_mlx.lab.tensors import TensorErrors, tensor_errors
from rl_mlx.lab.text import Text, demo_text, read_text

__all__ = [
    "Allocation",
    "Candidate",
    "Comparison",
    "Divergence",
    "Measurement",
    "Perplexity",
    "Reference",
    "Sensitivity",
    "TaskScores",
    "TensorErrors",
    "Text",
    "allocate",
    "calibrate",
    "compare",
    "demo_text",
    "divergence",
    "perplexity",
    "read_text",
    "sensitivity",
    "tasks",
    "tensor_errors",
]
