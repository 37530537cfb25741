"""The classes of liger-kernel 0.8.5's `liger_kernel.chunked_loss`, same names and calls, computed by the head operator.

    from fastalign.dropin.liger import LigerFusedLinearDPOLoss   # was: from liger_kernel.chunked_loss import ...

Constructors, `forward` and what it returns are Liger's, so that one import changes. Beyond it: no (2T, V) logits of a pair, rows
without a target reach no GEMM, the gradient of the weight is summed in float32 and rounded once, and the losses are those of
`fastalign.losses`. `compiled` and `chunk_size` steer Liger's own loop, change no number there and none here; the keyword-only
`budget` (bytes of logits at a time) and `impl` do that work, see `fastalign.linear_logps`. Values differ from Liger's where a
docstring says so, and a sequence without any target counts as a mean log-prob of 0, where Liger divides by 0.
"""

from fastalign.dropin.liger.distill import LigerFusedLinearJSDLoss as LigerFusedLinearJSDLoss
from fastalign.dropin.liger.paired import LigerFusedLinearCPOLoss as LigerFusedLinearCPOLoss
from fastalign.dropin.liger.paired import LigerFusedLinearDPOLoss as LigerFusedLinearDPOLoss
from fastalign.dropin.liger.paired import LigerFusedLinearORPOLoss as LigerFusedLinearORPOLoss
from fastalign.dropin.liger.paired import LigerFusedLinearSimPOLoss as LigerFusedLinearSimPOLoss
from fastalign.dropin.liger.policy import LigerFusedLinearGRPOLoss as LigerFusedLinearGRPOLoss
from fastalign.dropin.liger.unpaired import LigerFusedLinearKTOLoss as LigerFusedLinearKTOLoss
