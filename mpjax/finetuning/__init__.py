"""From own data to a model in use: fine-tune, keep the best, predict, export."""

from mpjax.finetuning.fine_tune import finetune
from mpjax.finetuning.finetuning_settings import Finetuning
from mpjax.finetuning.pretrained import Pretrained, from_pretrained
from mpjax.finetuning.tuned import Tuned, load_run

__all__ = ["Finetuning", "Pretrained", "Tuned", "finetune", "from_pretrained", "load_run"]
