#!/bin/sh
# The runs of the tables in README.md: DATA holds natural-instructions/ and dolly/.
#
#     experiments/systems/run.sh DATA OUTPUT [blocks|parts|dolly|gossip] [SEEDS]
#
# Finished runs are kept and interrupted ones continue, so the same command may be given again, with more seeds too. OMP_NUM_THREADS=1 is what was measured.
set -eu
[ $# -ge 2 ] || { sed -n '2,6p' "$0" | cut -c3-; exit 2; }
here=$(dirname "$0")
data=$1 output=$2 only=${3:-} seeds=${4:-0,1}

asked() { [ -z "$only" ] || [ "$only" = "$1" ]; }

tasks() { # NAME AND OPTIONS OF compare
    name=$1; shift
    fedmira compare "$here/sixteen_tasks.toml" --set "data.path=$data/natural-instructions" --set "data.split_list=$here/tasks.txt" --output "$output/$name" --seeds "$seeds" "$@"
}

if asked blocks; then
    tasks blocks --algorithms local,mira \
        --variant "shuffled=algorithm.name=mira;graph.shuffled=true" \
        --variant "blocks=algorithm.name=mira;graph.kind=blocks" \
        --variant "blocks-5=algorithm.name=mira;graph.kind=blocks;graph.blocks=5" \
        --variant "blocks-shuffled=algorithm.name=mira;graph.kind=blocks;graph.shuffled=true"
fi
if asked parts; then
    tasks parts --algorithms local,mtlora,cgc-lora,fedavg,fola,feddpa,ditto \
        --variant "mtlora-aligned=algorithm.name=mtlora;algorithm.own_coupling=1.0" \
        --variant "fedalt-factor=algorithm.name=fedalt;algorithm.rest_space=factor;algorithm.learned_share=true;graph.kind=uniform"
fi
if asked gossip; then
    tasks gossip --set graph.kind=category --set rounds.participation=0.5 --algorithms gossip,mira
fi
if asked dolly; then
    fedmira compare "$here/dolly.toml" --set "data.path=$data/dolly/databricks-dolly-7k.jsonl" --output "$output/dolly" --seeds "$seeds" --algorithms local,fedavg,fola,fedprox \
        --variant "fola-slow=algorithm.name=fola;local.learning_rate=1e-3" \
        --variant "fedavg-slow=algorithm.name=fedavg;local.learning_rate=1e-3"
fi
