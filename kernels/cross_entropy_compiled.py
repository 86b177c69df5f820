"""The mean loss of a head that is no plain linear layer, as torch.compile takes it: whole, since its own tracing does not follow
autograd inside autograd."""

import torch

from minilora.kernels.cross_entropy import mean_loss_of_any

mean_loss_of_any = torch._dynamo.nonstrict_trace(mean_loss_of_any)
