"""What every script needs and no method is: flags, files, checkpoints, the run folder, tables.

    files         writing and reading files; BadInput       run_folder   the training run: resume, log, save
    checkpoints   files of weights -> networks              watch        previews, evaluations, the health panel
    idx_cifar     files of MNIST's and CIFAR's kind         kept_runs    runs of tables: kept, resumed, checked
    flags         shared flags, presets, --dry_run          report       tables and figures of kept runs
    passes        counted forward passes of a step
"""
