"""The zoo: one line a model. Each family is one file beside this one."""

from mmzoo.registry import Entry, register

VIDEO = "video-text-to-text"
_AKI = {"family": "aki", "task": VIDEO, "rule": "modality-mutual", "scheme": "sequential", "paper": "arXiv:2503.02597"}

register(Entry("aki-4b", **_AKI, summary="SigLIP-so400m, Perceiver resampler, Phi-3.5-mini", weights="hf-hub:Sony/AKI-4B-phi-3.5-mini", license="cc-by-nc-4.0"))  # fmt: skip  # noqa: E501
register(Entry("aki-tiny", **_AKI, summary="AKI's classes at test size, random weights"))
register(Entry("aki-nano", **_AKI, summary="AKI's classes at 0.3 M parameters, trained in the synthetic world", weights="package:aki-nano", license="apache-2.0", sha256={"model.safetensors": "51a1ce238948df7e7810e26520cd99fc64da44328e282cf4b5962ab97308bd34"}))  # fmt: skip  # noqa: E501

_VISUALCHAT = {"family": "visualchat", "task": "image-text-to-text", "rule": "mmca", "scheme": "sequential", "paper": "arXiv:2309.14327"}  # fmt: skip  # noqa: E501

register(Entry("visualchat-7b", **_VISUALCHAT, summary="Qwen-VL's ViT, a linear projection, LLaMA-2 7B"))
register(Entry("visualchat-13b", **_VISUALCHAT, summary="Qwen-VL's ViT, a linear projection, LLaMA-2 13B"))
register(Entry("visualchat-tiny", **_VISUALCHAT, summary="DeepSpeed-VisualChat's classes at test size, random weights"))
