#!/bin/sh
# Installs detectron2 into a virtual environment whose other packages are there already.
# usage: install_detectron2.sh SOURCE BIN   (BIN: the environment's bin folder)
#
# sal-detectron2's wheel is tagged for CPython 3.10, and its compiled part loads there alone; nothing of Mask R-CNN FPN
# needs that part (ROIAlign and NMS are torchvision's), so the Python files are unpacked as they are. Anything else is
# built from source against the torch that is installed.
set -eu
source=$1
bin=$2
case $source in
sal-detectron2*)
    target=$("$bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    "$bin/pip" install --no-deps --upgrade --only-binary=:all: --python-version 3.10 --target "$target" "$source" ;;
*)
    "$bin/pip" install wheel ninja
    "$bin/pip" install --no-deps --no-build-isolation "$source" ;;
esac
"$bin/python" -W ignore -c "import detectron2; print('detectron2', detectron2.__version__)"
