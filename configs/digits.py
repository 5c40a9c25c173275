"""AdvMoE on scikit-learn's digits: two minutes on two CPU cores."""

from ml_collections import ConfigDict


def get_config():
    """Every value of the run."""
    config = ConfigDict()
    config.seed = 0
    config.method = "advmoe"  # standard, at, trades, hydra, joint or advmoe
    config.num_epochs = 32
    config.batch_size = 64  # over all devices
    config.microbatches = 1  # parts of a device's batch, to save memory
    config.num_devices = 0  # 0: all there are
    config.ema_decay = 0.0  # of an average of the weights, which is then evaluated; 0: none
    config.patience = 0  # epochs without a better validation RA that end a run; 0: any number

    config.model = ConfigDict()
    config.model.name = "resnet10_cifar"
    config.model.num_experts = 2  # 1: a dense network
    config.model.ratio = 0.5  # width of one pathway over the dense network's
    config.model.width = 16  # channels of the first convolution at ratio 1; 0: as published
    config.model.keep = 1.0  # share of channels a Sparse network reads (method hydra)
    config.model.raw_widening = False  # True: wide ResNets as in the published code
    config.model.top_k = 1
    config.model.gate = "straight_through"
    config.model.dispatch = "auto"  # blocks, every
    config.model.block_size = 0  # images per block of the dispatch; 0: chosen by the batch
    config.model.remat = False  # compute activations again instead of keeping them
    config.model.dtype = "float32"
    config.model.param_dtype = "float32"
    config.model.mean = (0.5,)
    config.model.std = (0.25,)
    config.model.router = ConfigDict()
    config.model.router.scope = "global"  # or per_layer
    config.model.router.resolution = 0  # larger images are shrunk for the router; 0: never
    config.model.router.width = 8
    config.model.router.blocks = 1

    config.data = ConfigDict()
    config.data.source = "digits"
    config.data.path = ""
    config.data.image_size = 0  # 0: as they are
    config.data.train_split = "train"
    config.data.test_split = "test"
    config.data.train_examples = 0  # 0: all
    config.data.validation_fraction = 0.1
    config.data.crop_padding = 0
    config.data.flip = False
    config.data.stream = False  # True: batches come from the host, images are decoded when needed
    config.data.cutmix = 0.0  # probability that an image gets a piece of another
    config.data.cutmix_alpha = 1.0
    config.data.extra_path = ""  # .npz of extra images and labels
    config.data.extra_share = 0.0  # of every batch

    config.attack = ConfigDict()  # of training; the ball is the evaluation's too
    config.attack.norm = "linf"
    config.attack.epsilon = 0.2
    config.attack.num_steps = 2
    config.attack.step_size = 0.125

    config.loss = ConfigDict({"beta": 6.0, "alpha": 6.0, "router_objective": "assignment"})
    config.loss.label_smoothing = 0.0
    config.loss.awp = 0.0  # relative size of adversarial weight perturbations; 0: none
    config.loss.awp_warmup_epochs = 0.0  # epochs before the first

    config.balance = ConfigDict()  # of the experts' load, against a router's collapse
    config.balance.importance = 0.0  # weights of balancing losses
    config.balance.load = 0.0  # needs noise
    config.balance.switch = 0.0
    config.balance.entropy = 0.0
    config.balance.noise = 0.0  # added to scores in training, such as 1 / num_experts
    config.balance.warmup_epochs = 0.0  # epochs of random routes

    # Of method hydra: a trained dense run's directory, and epochs in which scores are learned.
    config.pruning = ConfigDict({"dense_run": "", "epochs": 0})

    # A run whose parameters training starts from, and the half that stays: router or experts.
    config.start = ConfigDict({"run": "", "frozen": ""})

    config.optimizer = ConfigDict()
    for part in ("experts", "router"):
        config.optimizer[part] = ConfigDict()
        config.optimizer[part].name = "sgd"
        config.optimizer[part].learning_rate = 0.1
        config.optimizer[part].momentum = 0.9
        config.optimizer[part].weight_decay = 5e-4
        config.optimizer[part].schedule = "cosine"  # one_cycle or constant
        config.optimizer[part].warmup_epochs = 0.0
        config.optimizer[part].clip_norm = 0.0  # 0: gradients are not clipped
    # Straight-through gradients of a router grow with its scores, in the end to NaN.
    config.optimizer.router.clip_norm = 1.0

    config.evaluation = ConfigDict()
    config.evaluation.attacks = "clean,fgsm,pgd20,router"
    config.evaluation.step_size = 0.02
    config.evaluation.restarts = 1
    config.evaluation.batch_size = 360
    config.evaluation.validation_steps = 10  # PGD steps of the RA that chooses the best checkpoint

    config.checkpoint = ConfigDict({"keep": 3})
    return config
