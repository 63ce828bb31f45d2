"""The zoo: one line a model. Each family is one file beside this one."""

from mmzoo.registry import Entry, register

VIDEO = "video-text-to-text"
_AKI = {"family": "aki", "task": VIDEO, "rule": "modality-mutual", "scheme": "sequential", "paper": "arXiv:2503.02597"}

register(Entry("aki-4b", **_AKI, summary="SigLIP-so400m, Perceiver resampler, Phi-3.5-mini", weights="hf-hub:Sony/AKI-4B-phi-3.5-mini", license="cc-by-nc-4.0"))  # fmt: skip  # noqa: E501
register(Entry("aki-tiny", **_AKI, summary="AKI's classes at test size, random weights"))
register(Entry("aki-nano", **_AKI, summary="AKI's classes at 0.3 M parameters, trained in the synthetic world", weights="package:aki-nano", license="apache-2.0", sha256={"model.safetensors": "51a1ce238948df7e7810e26520cd99fc64da44328e282cf4b5962ab97308bd34"}))  # fmt: skip  # noqa: E501

_CCAM = {"family": "video_ccam", "task": VIDEO, "rule": "causal", "connector_rule": "ccam", "scheme": "sequential", "paper": "arXiv:2408.14023"}  # fmt: skip  # noqa: E501

register(Entry("video-ccam-4b", **_CCAM, summary="SigLIP-so400m, CCAM projector, Phi-3-mini-4k", weights="hf-hub:JaronTHU/Video-CCAM-4B", license="mit"))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-9b", **_CCAM, summary="SigLIP-so400m, CCAM projector, Yi-1.5-9B-Chat", weights="hf-hub:JaronTHU/Video-CCAM-9B", license="mit"))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-14b", **_CCAM, summary="SigLIP-so400m, CCAM projector, Phi-3-medium-4k", weights="hf-hub:JaronTHU/Video-CCAM-14B", license="mit"))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-4b-v1.1", **_CCAM, summary="SigLIP-so400m, CCAM projector, Phi-3-mini-4k", weights="hf-hub:JaronTHU/Video-CCAM-4B-v1.1", license="unknown"))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-9b-v1.1", **_CCAM, summary="SigLIP-so400m, CCAM projector, Yi-1.5-9B-Chat", weights="hf-hub:JaronTHU/Video-CCAM-9B-v1.1", license="mit"))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-14b-v1.1", **_CCAM, summary="SigLIP-so400m, CCAM projector, Phi-3-medium-4k", weights="hf-hub:JaronTHU/Video-CCAM-14B-v1.1", license="unknown"))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-4b-v1.2", **_CCAM, summary="SigLIP-so400m, CCAM projector, Phi-3.5-mini", weights="hf-hub:JaronTHU/Video-CCAM-4B-v1.2", license="unknown"))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-7b-v1.2", **_CCAM, summary="SigLIP-so400m, CCAM projector, Qwen2.5-7B-Instruct", weights="hf-hub:JaronTHU/Video-CCAM-7B-v1.2", license="apache-2.0"))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-tiny", **_CCAM, summary="Video-CCAM's classes at test size, random weights"))
