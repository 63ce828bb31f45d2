"""`import mmzoo.hf` teaches transformers' Auto classes every family of the zoo, without remote code.

import mmzoo.hf
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder)
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from mmzoo.registry import families

for model_type, module in families().items():
    config_class = module.MODEL.config_class
    AutoConfig.register(model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, module.MODEL, exist_ok=True)
    AutoModelForImageTextToText.register(config_class, module.MODEL, exist_ok=True)
    AutoProcessor.register(config_class, module.PROCESSOR, exist_ok=True)
