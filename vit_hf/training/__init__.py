"""Training: what a step changes, the loop and what falls due in it, checkpoints, and what ends a run. It is handed a model,
batches and functions, and knows no data, no Hub and no flags.
"""

from vit_hf.front import front

__getattr__ = front(
    __name__,
    {
        "accelerator": "build_accelerator check_drawing end",
        "actions": "Draw Evaluate Log LoopSettings Probe Push Save",
        "checkpoint": "Checkpoints",
        "fitting": "BatchSettings fit_batches",
        "folder": "begin open_folder resume",
        "freeze": "freeze_parameters",
        "loop": "train",
        "lost": "lost_process",
        "model_folder": "files_of",
        "objective": "choose_objective",
        "optimizer": "OptimizerSettings",
        "schedule": "ScheduleSettings make_schedule",
        "state": "prepare",
        "trackers": "open_trackers",
        "tracking": "mfu_scale",
        "waiting": "processes_of",
    },
)
