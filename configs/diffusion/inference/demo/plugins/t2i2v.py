# Small twin of ../../plugins/t2i2v.py: the models of ../../../train/demo_image.py, which draw 64px pictures.
_base_ = ["../../plugins/t2i2v.py", "../../../demo_image_models.py"]

img_resolution = "64px"
img_flux = dict(from_pretrained="assets/demo/image_mmdit.safetensors", **_base_.image_model)
img_flux_ae = _base_.image_ae_in_use
