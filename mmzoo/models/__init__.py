"""The zoo: one line a model. Each family is one file beside this one."""

from mmzoo.registry import Entry, register

VIDEO, IMAGE = "video-text-to-text", "image-text-to-text"
NEW_IMAGE = "unconditional-image-generation"  # the Hub's word for images of a class, too
SIGLIP, CLIP, VICUNA = "google/siglip-so400m-patch14-384", "openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"
PHI_3, PHI_3_MEDIUM, PHI_35 = "microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-medium-4k-instruct", "microsoft/Phi-3.5-mini-instruct"  # fmt: skip  # noqa: E501
YI, QWEN = "01-ai/Yi-1.5-9B-Chat", "Qwen/Qwen2.5-7B-Instruct"
_AKI = {"family": "aki", "task": VIDEO, "rule": "modality-mutual", "scheme": "sequential", "paper": "arXiv:2503.02597"}
_LLAVA = {"family": "llava", "task": IMAGE, "rule": "causal", "scheme": "sequential", "paper": "arXiv:2310.03744"}
_CCA = {"family": "cca_llava", "task": IMAGE, "rule": "concentric-causal", "scheme": "concentric", "paper": "arXiv:2410.15926"}  # fmt: skip  # noqa: E501
_TC = {"family": "tc_llava", "task": VIDEO, "rule": "frame-block-causal", "scheme": "temporal-dual", "paper": "arXiv:2409.03206"}  # fmt: skip  # noqa: E501
_CCAM = {"family": "video_ccam", "task": VIDEO, "rule": "causal", "connector_rule": "ccam", "scheme": "sequential", "paper": "arXiv:2408.14023"}  # fmt: skip  # noqa: E501
_ARPG = {"family": "arpg", "library": "diffusers", "task": NEW_IMAGE, "rule": "scale-causal", "scheme": "rope-2d", "paper": "arXiv:2503.10568"}  # fmt: skip  # noqa: E501
_VISUALCHAT = {
    "family": "visualchat",
    "task": IMAGE,
    "rule": "mmca",
    "scheme": "sequential",
    "paper": "arXiv:2309.14327",
}
_FAVOR = {"family": "favor", "task": VIDEO, "rule": "causal", "connector_rule": "causal-qformer", "scheme": "sequential", "paper": "arXiv:2310.05863"}  # fmt: skip  # noqa: E501
_SALMONN = {**_FAVOR, "paper": "arXiv:2406.15704"}

_LONGLIVE = {"family": "longlive", "task": "text-to-video", "rule": "sink-window", "scheme": "absolute-rope", "library": "diffusers", "paper": "arXiv:2509.22622"}  # fmt: skip  # noqa: E501

register(Entry("aki-4b", **_AKI, summary="SigLIP-so400m, Perceiver resampler, Phi-3.5-mini", weights="hf-hub:Sony/AKI-4B-phi-3.5-mini", license="cc-by-nc-4.0", base_model=(SIGLIP, PHI_35), datasets=("Salesforce/blip3-kale", "Salesforce/blip3-ocr-200m")))  # fmt: skip  # noqa: E501
register(Entry("aki-tiny", **_AKI, summary="AKI's classes at test size, random weights"))
register(Entry("aki-nano", **_AKI, summary="AKI's classes at 0.3 M parameters, trained in the synthetic world", weights="package:aki-nano", license="apache-2.0", sha256={"model.safetensors": "51a1ce238948df7e7810e26520cd99fc64da44328e282cf4b5962ab97308bd34"}))  # fmt: skip  # noqa: E501

register(Entry("llava-1.5-7b", **_LLAVA, summary="CLIP-L/336, a two-layer projector, Vicuna-7B; the causal baseline", weights="hf-hub:liuhaotian/llava-v1.5-7b", license="llama2", base_model=(CLIP, VICUNA), datasets=("liuhaotian/LLaVA-Pretrain",)))  # fmt: skip  # noqa: E501
register(Entry("llava-tiny", **_LLAVA, summary="LLaVA's classes at test size, random weights"))
register(Entry("cca-llava-7b", **_CCA, summary="LLaVA-1.5 under concentric causal attention", weights="hf-hub:xing0047/cca-llava-1.5-7b", license="llama2", base_model=(CLIP, VICUNA), datasets=("liuhaotian/LLaVA-Pretrain",)))  # fmt: skip  # noqa: E501
register(Entry("cca-llava-tiny", **_CCA, summary="CCA-LLaVA's classes at test size, random weights"))
register(Entry("cca-nano", **_CCA, summary="CCA-LLaVA's classes at 0.3 M parameters, trained in the synthetic world", weights="package:cca-nano", license="apache-2.0", sha256={"model.safetensors": "8c6872627a9e1df30a216625a80cd6c97a9ad6084ace769142eb154a95d4d0c0"}))  # fmt: skip  # noqa: E501
register(Entry("tc-llava-7b", **_TC, summary="LLaVA-1.5 on clips, under frame-wise block causal attention; no weights were released"))  # fmt: skip  # noqa: E501
register(Entry("tc-llava-tiny", **_TC, summary="TC-LLaVA's classes at test size, random weights"))
register(Entry("tc-llava-nano", **_TC, summary="TC-LLaVA's classes at 0.3 M parameters, trained in the synthetic world", weights="package:tc-llava-nano", license="apache-2.0", sha256={"model.safetensors": "102cc83c560eaacfa5eb4c6cdaec2827abccc6fc325eebe87b384f50033e43cd"}))  # fmt: skip  # noqa: E501

_VIDGPT = {"family": "vid_gpt", "task": "text-to-video", "rule": "causal-temporal", "scheme": "cyclic", "library": "diffusers", "paper": "arXiv:2406.10981"}  # fmt: skip  # noqa: E501
register(Entry("vid-gpt-xl", **_VIDGPT, summary="STDiT-XL/2 under causal temporal attention, a window of 25 frames; no weights were released"))  # fmt: skip  # noqa: E501
register(Entry("vid-gpt-tiny", **_VIDGPT, summary="ViD-GPT's classes at test size, random weights"))
register(Entry("vid-gpt-nano", **_VIDGPT, summary="ViD-GPT's classes at 0.4 M parameters, trained on the pixels of synthetic clips", weights="package:vid-gpt-nano", license="apache-2.0", sha256={"diffusion_pytorch_model.safetensors": "d4bf525a476b079b7bf9723cc99b8c1df0eba768e033613d13bba0c97a914d55"}))  # fmt: skip  # noqa: E501

register(Entry("visualchat-7b", **_VISUALCHAT, summary="Qwen-VL's ViT, a linear projection, LLaMA-2 7B"))
register(Entry("visualchat-13b", **_VISUALCHAT, summary="Qwen-VL's ViT, a linear projection, LLaMA-2 13B"))
register(Entry("visualchat-tiny", **_VISUALCHAT, summary="DeepSpeed-VisualChat's classes at test size, random weights"))
register(Entry("visualchat-nano", **_VISUALCHAT, summary="DeepSpeed-VisualChat's classes at 0.2 M parameters, trained in the synthetic world", weights="package:visualchat-nano", license="apache-2.0", sha256={"model.safetensors": "fb5be9cee4753faf9fd8e3181650b49869a44b0f812346b978636c3185e71c3a"}))  # fmt: skip  # noqa: E501

register(Entry("video-ccam-4b", **_CCAM, summary="SigLIP-so400m, CCAM projector, Phi-3-mini-4k", weights="hf-hub:JaronTHU/Video-CCAM-4B", license="mit", base_model=(SIGLIP, PHI_3)))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-9b", **_CCAM, summary="SigLIP-so400m, CCAM projector, Yi-1.5-9B-Chat", weights="hf-hub:JaronTHU/Video-CCAM-9B", license="mit", base_model=(SIGLIP, YI)))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-14b", **_CCAM, summary="SigLIP-so400m, CCAM projector, Phi-3-medium-4k", weights="hf-hub:JaronTHU/Video-CCAM-14B", license="mit", base_model=(SIGLIP, PHI_3_MEDIUM)))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-4b-v1.1", **_CCAM, summary="SigLIP-so400m, CCAM projector, Phi-3-mini-4k", weights="hf-hub:JaronTHU/Video-CCAM-4B-v1.1", license="unknown", base_model=(SIGLIP, PHI_3)))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-9b-v1.1", **_CCAM, summary="SigLIP-so400m, CCAM projector, Yi-1.5-9B-Chat", weights="hf-hub:JaronTHU/Video-CCAM-9B-v1.1", license="mit", base_model=(SIGLIP, YI)))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-14b-v1.1", **_CCAM, summary="SigLIP-so400m, CCAM projector, Phi-3-medium-4k", weights="hf-hub:JaronTHU/Video-CCAM-14B-v1.1", license="unknown", base_model=(SIGLIP, PHI_3_MEDIUM)))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-4b-v1.2", **_CCAM, summary="SigLIP-so400m, CCAM projector, Phi-3.5-mini", weights="hf-hub:JaronTHU/Video-CCAM-4B-v1.2", license="unknown", base_model=(SIGLIP, PHI_35)))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-7b-v1.2", **_CCAM, summary="SigLIP-so400m, CCAM projector, Qwen2.5-7B-Instruct", weights="hf-hub:JaronTHU/Video-CCAM-7B-v1.2", license="apache-2.0", base_model=(SIGLIP, QWEN)))  # fmt: skip  # noqa: E501
register(Entry("video-ccam-tiny", **_CCAM, summary="Video-CCAM's classes at test size, random weights"))
register(Entry("video-ccam-nano", **_CCAM, summary="Video-CCAM's classes at 0.3 M parameters, trained in the synthetic world", weights="package:video-ccam-nano", license="apache-2.0", sha256={"model.safetensors": "fc500d45959aca2c29d4334c4ab98dce5bbc0991a94e8ffc5a37b550484a8f74"}))  # fmt: skip  # noqa: E501

register(Entry("longlive-1.3b", **_LONGLIVE, summary="Wan2.1-T2V-1.3B made causal: blocks of 3 frames, a sink of 3 in a window of 12, four steps, KV-recache", weights="hf-hub:Efficient-Large-Model/LongLive-1.3B", license="unknown", base_model=("Wan-AI/Wan2.1-T2V-1.3B",)))  # fmt: skip  # noqa: E501
register(Entry("longlive-tiny", **_LONGLIVE, summary="LongLive's classes at test size, in pixels, random weights"))
register(Entry("arpg-300m", **_ARPG, summary="ARPG-L: images of ImageNet's classes by randomised parallel decoding, 320 M parameters"))  # fmt: skip  # noqa: E501
register(Entry("arpg-700m", **_ARPG, summary="ARPG-XL: images of ImageNet's classes by randomised parallel decoding, 719 M parameters"))  # fmt: skip  # noqa: E501
register(Entry("arpg-1b", **_ARPG, summary="ARPG-XXL: images of ImageNet's classes by randomised parallel decoding, 1.3 B parameters"))  # fmt: skip  # noqa: E501
register(Entry("arpg-tiny", **_ARPG, summary="ARPG's classes at test size, random weights"))
register(Entry("favor-7b", **_FAVOR, summary="InstructBLIP's ViT-g and Q-Former, Whisper-large-v2, causal Q-Former, Vicuna-7B"))  # fmt: skip  # noqa: E501
register(Entry("favor-13b", **_FAVOR, summary="InstructBLIP's ViT-g and Q-Former, Whisper-large-v2, causal Q-Former, Vicuna-13B"))  # fmt: skip  # noqa: E501
register(Entry("video-salmonn-13b", **_SALMONN, summary="as FAVOR, with a second audio stream and a multi-resolution causal Q-Former"))  # fmt: skip  # noqa: E501
register(Entry("favor-tiny", **_FAVOR, summary="FAVOR's classes at test size, random weights"))
register(Entry("video-salmonn-tiny", **_SALMONN, summary="video-SALMONN's classes at test size, random weights"))
register(Entry("favor-nano", **_FAVOR, summary="FAVOR's classes at 0.4 M parameters, trained in the synthetic world with sound", weights="package:favor-nano", license="apache-2.0", sha256={"model.safetensors": "7fd84f2e0b25abf26994e7f18c8716fc2632f53e9f71b2a6b6e216dac06943a6"}))  # fmt: skip  # noqa: E501
