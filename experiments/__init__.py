"""Published results, what goes beyond them, studies of one's own, and what they share. See `python -m experiments`."""

# name: (module, what it shows, usual running time on two cores). Nothing is imported before it is asked for.
EXPERIMENTS = {
    "small-batch": ("experiments.published.small_batch",
                    "batch norm fails at batch size 2, running batch norm does not",
                    "5 min on MNIST, 40 s on the digits"),
    "breast-cancer": ("experiments.published.breast_cancer",
                      "five exercises on batch norm, the breast cancer data", "2 s"),
    "vmap": ("experiments.published.vmap_batchnorm",
             "batch norm written for one image and mapped over the batch", "2 min"),
    "lenet": ("experiments.published.lenet", "LeNet takes fewer epochs with batch norm, on Fashion-MNIST", "5 min"),
    "lesson": ("experiments.published.lesson", "every training run of the batch norm lesson", "5 min"),
    "one-epoch": ("experiments.published.one_epoch", "how accurate a network becomes in one epoch", "3 min"),
    "best": ("experiments.beyond.best", "the best that the small-batch network learns at batch size 2, recipe free",
             "4 min, of 20 seeds half an hour"),
    "lab": ("experiments.lab.lab", "every norm at every batch size, rates tuned alike, on two networks and any images",
            "hours; see --help for a smaller one"),
    "dying": ("experiments.lab.dying", "why one run in a hundred of the small-batch network dies, and what prevents it",
              "an hour and a half"),
}
TOOLS = {
    "inside": ("experiments.inside", "look inside a short training: all pictures on one page", "20 s"),
    "bench": ("experiments.bench", "what the norms, the runner, hooks and an epoch cost, as ratios", "25 min"),
    "convolutions": ("experiments.convolutions", "measure the rule for convolutions on a CPU anew", "20 s"),
    "table": ("experiments.table", "print the results table of a run folder as Markdown", "at once"),
}
