#!/bin/sh
# FedAvg with SGD, Adam, AdamW and Sophia as clients' optimizer on eight Natural Instructions tasks: rounds and seconds to a loss.
#
#   sh experiments/fed_sophia/real.sh TASKS OUTPUT [TARGET] [SEEDS]
#
# TASKS is the folder that holds tasks/. Minutes on one core with the bundled base. Called again with another TARGET it only reads
# the finished runs. Learning rates: of the grid of the log (experiments/LOG.md), and for Sophia the paper's own too.
set -eu
tasks=$1 output=$2 target=${3:-3.0} seeds=${4:-0}
sophia="local.optimizer=sophia;local.optimizer_state=kept"
fedmira compare --preset fed-sophia-ni --algorithms fedavg --seeds "$seeds" --target-loss "$target" --output "$output" \
    --set data.path="$tasks" --set data.clients=8 --set data.max_rows=64 --set data.test_rows=16 --set data.max_length=256 \
    --set local.optimizer=adamw --set local.optimizer_state=fresh --set local.learning_rate=3e-3 --set local.weight_decay=0 \
    --set local.batch_size=4 --set local.steps=10 --set rounds.count=12 --set evaluation.every=1 --set evaluation.rouge=false \
    --variant "adam=local.optimizer=adam" \
    --variant "sgd=local.optimizer=sgd;local.learning_rate=0.3" \
    --variant "sgd-slower=local.optimizer=sgd;local.learning_rate=0.1" \
    --variant "sophia=$sophia;local.sophia_refresh=5" \
    --variant "sophia-wide=$sophia;local.sophia_refresh=5;local.sophia_gamma=1.0" \
    --variant "sophia-paper=$sophia;local.learning_rate=1e-3;local.weight_decay=0.02"
