"""EdgeFace-XS (George et al. 2024) as a trunk: timm's EdgeNeXt, with a patch stem, layer norms and attention.

    pip install timm
    btnet adapt --trunk edgeface_xs.safetensors --adapter docs/edgeface.py --faces my_faces/ --out my_btnet/

A unit is what down-samples together with the block behind it, so that a branch ends behind a block, as in IResNet,
and not behind a bare patch convolution.
"""

import timm
from torch import nn

from btnet_tools.adapter import Adapter


class EdgeFaceXS(Adapter):
    size = (112, 112)
    embedding = 512
    mean, std = 127.5, 127.5

    def build(self):
        return timm.create_model("edgenext_x_small", num_classes=self.embedding)

    def split(self, network):
        body = {}
        for number, stage in enumerate(network.stages):
            first = network.stem if number == 0 else stage.downsample
            body[f"stage{number}_0"] = nn.Sequential(first, stage.blocks[0])
            for index, block in enumerate(stage.blocks[1:], 1):
                body[f"stage{number}_{index}"] = block
        return body, network.head
