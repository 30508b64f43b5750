# What each host of a slice runs at every boot, to become a node of the driver's Ray cluster and to
# stay one. `pod/startup.py` writes this run's values above these lines.
#
# It goes on for ever: whenever the host leaves the cluster, because the driver ended or the network
# did, it looks for a newer script and tries again. It ends when the VM has no start-up script any
# more. Nothing is lost by a reboot in the middle of anything. The log: ~/.mesh-transformer/startup.log
set -euo pipefail
umask 077
export HOME=${HOME:-/root} # start-up scripts are given none
dir=$HOME/.mesh-transformer
venv=$dir/venv
mkdir -p "$dir"
exec >>"$dir/startup.log" 2>&1

say() {
    printf '%(%F %T)T %s\n' -1 "$*"
}

# Downloads an address to a file that is there wholly or not at all. The address goes by standard
# input, since command lines are shown to every user of a machine.
fetch() {
    case $1 in
    gs://*) gcloud --quiet storage cp "$1" "$2.part" ;;
    *)
        curl --config - --noproxy '*' --fail --silent --show-error --connect-timeout 10 \
            --max-time 300 --output "$2.part" <<<"url = \"$1\""
        ;;
    esac && mv -f "$2.part" "$2"
}

# Writes an attribute of this VM to a file and prints the HTTP status, 000 if nobody answers.
metadata() {
    local host=${GCE_METADATA_HOST:-metadata.google.internal}
    curl --noproxy '*' --silent --max-time 10 --header 'Metadata-Flavor: Google' --output "$2" \
        --write-out '%{http_code}' "http://$host/computeMetadata/v1/instance/attributes/$1" || true
}

# A driver that was started again may be somewhere else, or have another version of the library.
renew() {
    case $(metadata startup-script "$dir/latest") in
    404)
        say "this VM has no start-up script any more: done"
        exit 0
        ;;
    200)
        if ! cmp --silent "$dir/latest" "$dir/running"; then
            say "going on with a newer script"
            mv -f "$dir/latest" "$dir/running"
            exec bash "$dir/running"
        fi
        ;;
    esac
}

find_worker() {
    worker=${TPU_WORKER_ID:-}
    until [[ $worker =~ ^[0-9]+$ ]]; do
        if [[ $(metadata agent-worker-number "$dir/worker") == 200 ]]; then
            worker=$(<"$dir/worker")
        else
            say "waiting for the number of this host"
            sleep 2
        fi
    done
}

# The driver's version of the library and of all that it depends on, in an environment of its own.
# What writes $venv/build comes last: an installation that was cut off is begun anew.
install_library() {
    [[ $(cat "$venv/build" 2>/dev/null) != "$build" ]] || return 0
    say "installing $build"
    fetch "$wheel_url" "$dir/$wheel" || return
    sha256sum --check --status <<<"$wheel_sha256  $dir/$wheel" || {
        say "the wheel is not the one that the driver built"
        return 1
    }
    printf '%s\n' "$constraints" >"$dir/constraints.txt"
    rm -rf "$venv"
    local library="mesh-transformer[$extras] @ file://$dir/$wheel"
    if "python$python" -m venv "$venv"; then
        "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
            --constraint "$dir/constraints.txt" "$library"
    else
        say "there is no Python $python on this VM: getting one"
        python3 -m pip install --quiet --upgrade --target "$dir/uv" uv &&
            "$dir/uv/bin/uv" venv --quiet --clear --python "$python" "$venv" &&
            "$dir/uv/bin/uv" pip install --quiet --python "$venv/bin/python" \
                --constraint "$dir/constraints.txt" "$library"
    fi && printf '%s\n' "$build" >"$venv/build"
}

# The driver hands its token out until all hosts have it; after a reboot the one kept here serves.
fetch_token() {
    if [[ -n $token_secret ]]; then
        gcloud --quiet secrets versions access latest --secret "$token_secret" \
            --out-file "$dir/token.part" && mv -f "$dir/token.part" "$dir/token"
    else
        fetch "$token_url" "$dir/token"
    fi || [[ -s $dir/token ]]
}

# Ray compares Python versions to the last digit unless told that the minor one is enough. A host
# whose driver is gone leaves after 20 seconds, to look for the next one. Were libtpu's logs in
# the folder that is named here, Ray would show the driver every line of them.
join() {
    mkdir -p "$dir/empty"
    say "joining $head as host $worker of $name"
    RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$dir/token TPU_LOG_DIR=$dir/empty \
        RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor RAY_gcs_rpc_server_reconnect_timeout_s=20 \
        "$venv/bin/python" -m ray.scripts.scripts start --address="$head" \
        --labels="mesh-slice=$name,mesh-worker=$worker,mesh-build=$build" \
        ${num_cpus:+--num-cpus="$num_cpus"} --temp-dir="${TMPDIR:-/tmp}/ray" --disable-usage-stats \
        --block
}

[[ $0 -ef $dir/running ]] || cp -- "$0" "$dir/running"
find_worker
pause=1
while :; do
    renew
    began=$(date +%s)
    if install_library && fetch_token; then
        join || say "left the cluster (status $?)"
    fi
    (($(date +%s) - began < 60)) || pause=1 # it had been a node for a while
    sleep "$pause"
    ((pause = pause < 30 ? 2 * pause : 60))
done
