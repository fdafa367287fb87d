# From raw footage to a training table, without weights to download and without a caption model:
# cut, score, take duplicates and bad clips out. Add "clip", "aesthetic", "caption", "match", "final" as you have them.
stages = [
    "ingest",
    "scenes",
    "cut",
    "motion",
    "camera",
    "flow",
    "blur",
    "frames",
    "ocr",
    "duplicates",
    "filter",
]

# Thresholds [lowest, highest] from lenient to strict; a clip must reach the first to stay in.
filter = dict(
    tiers=dict(
        base=dict(
            score_vmafmotion=[0.3, 60],  # neither a photograph nor chaos
            sharpness=[2, None],
            text_area=[None, 0.05],
            jitter=[None, 0.02],
        ),
        fine=dict(
            score_vmafmotion=[1, 30],
            sharpness=[6, None],
            text_area=[None, 0.005],
            jitter=[None, 0.004],
        ),
    )
)
