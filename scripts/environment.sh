# Sourced by demo.sh and test.sh: a virtual environment with qtool and its tools, made once and kept up to date.
# torch comes first and pinned, so that nothing after it pulls another one; where you want the CPU build from PyTorch's
# own index, set TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu

make_environment() {
    local stamp=.venv/installed-from
    local state
    # strict editable installs link files one by one: a new file needs a new install
    state=$(cat pyproject.toml constraints.txt; find pipeline convert quantize evaluate recipes -type f ! -name '*.pyc' | sort)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && .venv/bin/python -c 'import qtool' 2>/dev/null; then
        return
    fi
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    local pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)
    if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        "${pip[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
    fi
    "${pip[@]}" --editable '.[test]'
    printf '%s' "$state" > "$stamp"
}
