#!/usr/bin/env bash
# make_runs.sh CHECKOUT FOLDER: make the stored runs anew, in FOLDER, with the package in CHECKOUT (commit 158d277)
set -eu
mkdir -p "$2"
PYTHONPATH=$(realpath "$1")
XDG_CACHE_HOME=$(mktemp -d)
export PYTHONPATH XDG_CACHE_HOME OMP_NUM_THREADS=1
cd "$2"  # every path that a run writes down is relative to this folder

data="tracking=none device=cpu data.batch_size=32 data.train=96 data.validation=64 data.test=64"
steps="train.steps=4 train.validate_every=2 train.log_every=1"
front="front.images=32 front.budget=2e4"
tiny="backbone.depth=8 backbone.checkpoint=tiny/backbone.safetensors"
exits="backbone=resnet32_exits backbone.depth=8 backbone.exits=[0,1]"
trained="$exits backbone.checkpoint=exits/network.safetensors"
linear="backbone=resnet32_linear backbone.depth=8 backbone.exits=[1] backbone.checkpoint=linear/network.safetensors"

make() { python -m policyskip "$@" > /dev/null; }

# The same, stopped by SIGINT after its second update, as by Ctrl-C; policyskip ends with 130 then.
stop() {
  code=0
  python - "$@" > /dev/null <<'PYTHON' || code=$?
import os, signal, sys
from policyskip import cli

class Stopping:
    def __init__(self, stream):
        self.stream = stream
    def write(self, text):
        if text.startswith("step 2/"):
            os.kill(os.getpid(), signal.SIGINT)
        return self.stream.write(text)
    def __getattr__(self, name):
        return getattr(self.stream, name)

sys.argv[0] = "policyskip"
sys.stdout = Stopping(sys.stdout)
cli.main()
PYTHON
  [ $code = 130 ]
}

# run NAME WORDS...: a whole run;  pair NAME WORDS...: and another that is stopped half way
run() { name=$1; shift; make "$@" run.dir=$name; }
pair() { name=$1; shift; make "$@" run.dir=$name; stop "$@" run.dir=$name-half; }

# The networks that the tiny runs start from; those that train them have a copy, start.safetensors, for they go away.
start="tracking=none device=cpu data.train=2000 data.validation=64 data.test=64 train.steps=400 train.validate_every=400"
run tiny pretrain backbone=cifar_resnet backbone.depth=8 backbone.width=2 $start data.batch_size=128
run exits train agent=branchynet $exits $tiny agent.search=common $start
run linear train agent=branchynet backbone=resnet32_linear $tiny backbone.exits=[1] agent.search=common $start

run blockdrop train agent=blockdrop agent.width=2 agent.warm_start=false agent.initial_keep=0.5 agent.lr=1e-3 \
  $data $steps $front
pair budget train agent=blockdrop agent.policy=constant reward=budget reward.target=0.5 $data $steps $front
run ppo train agent=ppo agent.channels=[4,8] agent.net_arch=[8] agent.warm_start=false agent.initial_keep=0.5 \
  agent.learning_rate=1e-4 $data $steps $front
run ppo-layer train agent=ppo env=layer_skip agent.net_arch=[8] agent.initial_keep=0.5 agent.learning_rate=1e-4 \
  $data $steps $front
run dqn-layer train agent=dqn env=layer_skip agent.net_arch=[8] agent.learning_starts=64 agent.buffer_size=64 \
  $data $steps $front
for agent in best_static distributed random oracle; do run $agent train agent=$agent $data $front; done
pair skipnet train agent=skipnet agent.initial_keep=0.5 agent.lr=1e-3 agent.hybrid_lr=1e-3 agent.optimizer=sgd \
  backbone=cifar_resnet $tiny $data $steps $front
pair branchynet train agent=branchynet $trained target.macs_fraction=0.8 $data $steps
run cdl train agent=cdl $linear agent.delta=0.5 target.macs_fraction=0.8 $data $steps
run msdnet train agent=msdnet data=digits backbone.num_exits=2 backbone.channels=2 backbone.growth_rate=2 \
  backbone.head_channels=2 target.macs_fraction=0.8 $data $steps
pair a2c-exit train agent=a2c env=early_exit $linear agent.net_arch=[8] agent.initial_keep=0.5 \
  agent.learning_rate=1e-4 $data $steps
pair pretrain pretrain backbone=cifar_resnet backbone.depth=8 backbone.width=2 $data $steps
run calibrated train agent=distiller $trained agent.search=quota $data $steps
make calibrate run=calibrated target.macs_fraction=0.6

rm -r tiny exits linear "$XDG_CACHE_HOME"
rm -r ./*/plots
