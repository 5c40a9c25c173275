"""Every value of a config, once for each family of models; a config says what differs.

A config file starts from here::

    from advmoe_jax import defaults

    def get_config():
        config = defaults.cnn()
        config.attack.epsilon = 4 / 255
        return config

The types of these values are the types that a config's values must have (``config.check``).
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from advmoe_jax.models.cnn import CNN
from advmoe_jax.models.vit import ViT
from advmoe_jax.training.optimizers import OptimizerSettings


def cnn() -> ConfigDict:
    """CNNs: dense, mixtures of experts, Sparse. As they are, the setting of the published code.

    That is AdvMoE with a ResNet-18 of two half-width experts on CIFAR-10.
    """
    config = ConfigDict()
    config.family = "cnn"
    config.seed = 0
    config.method = "advmoe"  # one of training.methods.METHODS
    config.num_epochs = 100
    config.batch_size = 128  # over all devices
    config.microbatches = 1  # parts of a device's batch, to save memory
    config.num_devices = 0  # 0: all there are
    config.expert_shards = 1  # devices that share the experts of a V-MoE; 1: each has all
    config.ema_decay = 0.0  # of an average of the weights, which is then evaluated; 0: none
    config.patience = 0  # epochs without a better validation RA that end a run; 0: any number

    config.model = values_of(CNN(num_experts=2, ratio=0.5))  # models.cnn.CNN says what they mean
    config.model.mean = (0.4914, 0.4822, 0.4465)
    config.model.std = (0.2470, 0.2435, 0.2616)

    config.data = data()

    config.attack = ConfigDict()  # of training; the ball is the evaluation's too
    config.attack.norm = "linf"
    config.attack.epsilon = 8 / 255
    config.attack.num_steps = 2
    config.attack.step_size = 5 / 255
    config.attack.mode = "inference"  # train: as RDI-Nets, see training.methods.multi_exit

    config.loss = ConfigDict()
    config.loss.beta = 6.0  # weight of the KL terms
    config.loss.alpha = 6.0  # weight of the router's cross-entropy under assignment
    config.loss.router_objective = "assignment"  # see training.methods.advmoe
    config.loss.router_attack = "joint"  # on answers and scores, as published; or on one alone
    config.loss.class_experts = ()  # of each class, for assignment; empty: class modulo experts
    config.loss.consistency = 0.0  # weight of what other pathways say; of method advmoe
    config.loss.label_smoothing = 0.0
    config.loss.awp = 0.0  # relative size of adversarial weight perturbations; 0: none
    config.loss.awp_warmup_epochs = 0.0  # epochs before the first

    config.exits = exits()

    config.balance = ConfigDict()  # of the experts' load, against a router's collapse
    config.balance.importance = 0.0  # weights of balancing losses
    config.balance.load = 0.0  # needs noise
    config.balance.switch = 0.0
    config.balance.entropy = 0.0
    config.balance.noise = 0.0  # added to scores in training, such as 1 / num_experts
    config.balance.warmup_epochs = 0.0  # epochs of random routes
    config.balance.random_share = 0.0  # of the images whose routes are random in every step
    config.balance.shared_steps = 0.0  # of the other experts' gradients, in an expert's step

    config.pruning = ConfigDict()  # of method hydra
    config.pruning.dense_run = ""  # a trained dense run's directory
    config.pruning.epochs = 0  # in which scores are learned

    config.start = start()

    config.optimizer = ConfigDict()
    # Of everything but the router: of the side exits too, and of a network without a router.
    config.optimizer.experts = values_of(OptimizerSettings())
    # Of the router; of the channel scores in a Sparse network. Straight-through gradients of a
    # router grow with its scores, in the end to NaN: hence the clipping.
    config.optimizer.router = values_of(OptimizerSettings(clip_norm=1.0))

    config.evaluation = ConfigDict()
    config.evaluation.attacks = "clean,fgsm,pgd10,pgd50,router"
    config.evaluation.step_size = 2 / 255
    config.evaluation.restarts = 1
    config.evaluation.batch_size = 500
    config.evaluation.thresholds = "quota"  # when images leave early, see evaluation.thresholds
    config.evaluation.validation_steps = 10  # PGD steps of the RA that chooses the best checkpoint
    config.evaluation.show_every = 0  # epochs between pictures in TensorBoard; 0: none

    config.checkpoint = ConfigDict({"keep": 3})
    return config


def data() -> ConfigDict:
    """Which images there are, and how batches are made of them: CIFAR-10, cropped and flipped."""
    group = ConfigDict()
    group.source = "tfds:cifar10"  # digits, tfds:NAME, or image_folder with data.path
    group.path = ""
    group.image_size = 0  # 0: as they are
    group.train_split = "train"
    group.test_split = "test"  # withheld: the validation split, to try things out on
    group.train_examples = 0  # 0: all
    group.validation_fraction = 0.1
    group.crop_padding = 4  # pixels
    group.flip = True
    group.stream = False  # True: batches come from the host, images are decoded when needed
    group.workers = 0  # processes that decode training batches, with stream; 0: threads
    group.cutmix = 0.0  # probability that an image gets a piece of another
    group.cutmix_alpha = 1.0
    group.mixup = 0.0  # alpha of the Beta distribution that images are mixed by; 0: none
    group.crop_area = 1.0  # least share of the image that a resized crop takes; 1: no such
    group.crop_whole = False  # True: of the image as it was, not of its square; with stream
    group.extra_path = ""  # .npz of extra images and labels
    group.extra_share = 0.0  # of every batch
    return group


def exits() -> ConfigDict:
    """How networks with side exits (``model.exits``) are trained by method multi_exit."""
    group = ConfigDict()
    group.defence = "max_average"  # what its attack is on
    group.weights = ()  # of the exits' losses, the main one last; empty: 1 each
    group.objective = "halves"  # clean and attacked; or trades
    return group


def start() -> ConfigDict:
    """What training starts from instead of random parameters."""
    group = ConfigDict()
    group.run = ""  # a run whose parameters training starts from
    group.frozen = ""  # the half that stays as it is: router or experts
    group.equal_experts = False  # True: all experts of a layer start as its first one
    return group


def vit() -> ConfigDict:
    """Vision transformers: dense (ViT) and with sparse experts (V-MoE). The recipe is ours.

    As they are: adversarial training of a V-MoE of 8 experts, one per token, on CIFAR-10.
    """
    config = cnn()
    config.family = "vit"
    config.method = "at"
    del config.pruning  # there are no channels to prune
    model = ViT("vit_tiny_32", num_experts=8)  # models.vit.ViT says what the values mean
    config.model = values_of(model)
    config.model.mean = (0.5, 0.5, 0.5)
    config.model.std = (0.5, 0.5, 0.5)
    config.loss.router_objective = "pathway"  # one class to one expert is no aim for tokens
    config.balance.importance = 0.01  # averaged over layers; V-MoE adds up 0.005 of each
    adamw = OptimizerSettings("adamw", 1e-3, weight_decay=0.05, warmup_epochs=2.0, clip_norm=1.0)
    config.optimizer.experts = values_of(adamw)
    config.optimizer.router = values_of(adamw)
    config.evaluation.attacks = "clean,fgsm,pgd10,pgd50"
    return config


FAMILIES: dict[str, Callable[[], ConfigDict]] = {
    "cnn": cnn,
    "vit": vit,
}


def comparison() -> ConfigDict:
    """What a comparison of several rows has besides its runs' config and its table of rows."""
    config = ConfigDict()
    config.rows = ""  # names in the table, comma-separated
    config.reference = ""  # the row that the others are compared with
    config.remark = ""  # what its tables must not be read without
    config.num_seeds = 3  # from run.seed on
    config.attacks = "pgd50"  # the router agreement is that under the first
    config.examples = 0  # test images; 0: all
    config.strong_attacks = "autoattack,moe"  # evaluated on fewer images
    config.strong_examples = 1000
    config.explained_attack = "pgd20"
    config.explained_examples = 1000
    config.sparse_keep = 0.0  # share of channels of a Sparse network; 0: at the mixture's MACs
    return config


def values_of(record: Any) -> ConfigDict:
    """The values of a nested NamedTuple."""
    nested = {
        name: values_of(value) if hasattr(value, "_asdict") else value
        for name, value in record._asdict().items()
    }
    return ConfigDict(nested)
