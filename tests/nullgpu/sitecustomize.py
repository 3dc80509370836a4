"""Switch off cuDNN, which the null GPU lacks, in every Python process with this folder on its path.

For whole programs, such as benchmarks/on_gpu.sh --rehearse.
"""

import torch

torch.backends.cudnn.enabled = False
torch.backends.cuda.enable_cudnn_sdp(False)
