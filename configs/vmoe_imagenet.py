"""Published V-MoEs on ImageNet at 384x384: what ``import_vmoe`` and fine-tuning start from.

The recipe is the published fine-tuning's: SGD, batches of 1,024, 10,000 steps (8 epochs), a peak of
0.03 after 500 steps, experts with places for 1.5 times an even load in training. Evaluation drops
nothing. Images are resized by their shorter side and cut, the published code stretches them.
"""

from advmoe_jax import defaults


def get_config():
    """What differs from the family's defaults."""
    config = defaults.vit()
    config.method = "standard"
    config.num_epochs = 8
    config.batch_size = 1024
    config.model.name = "vit_b16"
    config.model.top_k = 2
    config.model.image_size = 384
    config.model.dtype = "bfloat16"
    config.model.capacity.training = 1.5

    config.data.source = "image_folder"
    config.data.path = "imagenet"  # a directory: train/<class>/*.JPEG, val/<class>/*.JPEG
    config.data.test_split = "val"
    config.data.image_size = 384
    config.data.stream = True  # decoded while the device computes, by data.workers processes
    config.data.validation_fraction = 0.005
    config.data.crop_padding = 0
    config.data.crop_area = 0.05
    config.data.crop_whole = True

    config.attack.epsilon = 4 / 255
    config.attack.step_size = 2.5 / 255
    config.balance.load = 0.01
    config.balance.noise = 0.125  # 1 / num_experts
    for group in (config.optimizer.experts, config.optimizer.router):
        group.name = "sgd"
        group.learning_rate = 0.03
        group.weight_decay = 0.0
        group.warmup_epochs = 0.4
        group.clip_norm = 10.0

    config.evaluation.attacks = "clean,vmoe_pgd"
    config.evaluation.step_size = 1 / 255
    config.evaluation.batch_size = 64
    return config
