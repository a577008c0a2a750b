#!/bin/sh
# Compares the methods on 44 Natural Instructions tasks and on Dolly: DATA holds natural-instructions/ and dolly/.
#
#     experiments/comparison/run.sh DATA OUTPUT [natural_instructions|dolly]
#
# Finished runs are kept and interrupted ones continue, so the same command may be given again. OMP_NUM_THREADS=1 is what was measured.
set -eu
[ $# -ge 2 ] || { sed -n '2,6p' "$0" | cut -c3-; exit 2; }
here=$(dirname "$0")
data=$1 output=$2 only=${3:-}

compare() { # NAME PATH-OF-DATA
    [ -z "$only" ] || [ "$only" = "$1" ] || return 0
    fedmira compare "$here/$1.toml" --set "data.path=$2" --output "$output/$1" --seeds 0,1,2 --reference fedavg --controls \
        --algorithms local,two-level,mira,fedavg,fedit-finetune,ditto,fedalt,share-factor,flexlora,fedex,fedprox,feddpa,lora-fair,rolora \
        --variant "mira-safeguard=algorithm.name=mira;algorithm.safeguard=true" \
        --variant "fedalt-uniform=algorithm.name=fedalt;graph.kind=uniform;adapter.rank=32;adapter.alpha=32" \
        --variant "fedalt-factor=algorithm.name=fedalt;algorithm.rest_space=factor;algorithm.learned_share=true;graph.kind=uniform;adapter.rank=32;adapter.alpha=32" \
        --variant "ffa=algorithm.name=share-factor;algorithm.shared_factor=B;algorithm.private_factor=frozen"
}

compare natural_instructions "$data/natural-instructions"
compare dolly "$data/dolly/databricks-dolly-7k.jsonl"
