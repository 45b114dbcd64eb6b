"""The scripts that `errata completion` prints. Every word in them can stand in a shell unquoted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Words:
    """What can be typed.

    Attributes:
        commands: What can follow `errata`.
        names: By command: words, flags, and the names of values, which end with `=`.
        values: By name: what can follow the `=`, where that is known.
    """

    commands: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]]
    values: Mapping[str, tuple[str, ...]]


BASH = """\
# errata in bash: eval "$(errata completion bash)"
_errata() {
    local line=${COMP_LINE:0:COMP_POINT} names='' values='' before='' name word found
    word=${line##*[[:space:]]}
    COMPREPLY=()
    if (( COMP_CWORD == 1 )); then
        values='@COMMANDS@'
    elif [[ $word != *=* ]]; then
        case ${COMP_WORDS[1]} in
@NAMES@
        esac
    else
        name=${word%%=*} word=${word#*=}
        case $name in
@VALUES@
        esac
        if [[ $word == *,* ]]; then before=${word%,*}, word=${word##*,}; fi
        # bash replaces only what follows the last of these characters.
        if [[ $COMP_WORDBREAKS != *=* ]]; then before=$name=$before; fi
    fi
    while IFS= read -r found; do
        [[ -n $names && $word != *.* && $found == *.?* ]] && continue
        [[ -n $names && $found == "$word" && $found == *. ]] && continue
        COMPREPLY+=("$before$found")
    done < <(compgen -W "$names$values" -- "$word")
    if [[ ${COMPREPLY[*]} == *[=.] ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o bashdefault -o default -F _errata errata
"""

ZSH = """\
#compdef errata
# errata in zsh: eval "$(errata completion zsh)"
_errata() {
    local word=$PREFIX
    local -a names values
    if (( CURRENT == 2 )); then
        compadd -- @COMMANDS@
    elif [[ $word != *=* ]]; then
        case $words[2] in
@NAMES@
        esac
        if [[ $word == *.* ]]; then names=(${names:#*.}); else names=(${names:#*.?*}); fi
        compadd -S '' -- ${(M)names:#*[=.]}
        compadd -- ${names:#*[=.]}
        (( $#names )) || _files
    else
        case ${word%%=*} in
@VALUES@
        esac
        compset -P '*='
        compset -P '*,'
        compadd -- $values || _files
    fi
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _errata "$@"
else
    compdef _errata errata
fi
"""

FISH = """\
# errata in fish: errata completion fish > ~/.config/fish/completions/errata.fish
function __errata_words
    set -l typed (commandline -opc)
    set -l word (commandline -ct)
    set -l found
    if test (count $typed) -eq 1
        set found @COMMANDS@
    else if not string match -q -- '*=*' $word
        switch $typed[2]
@NAMES@
        end
        if string match -q -- '*.*' $word
            set found (string match -v -- '*.' $found)
        else
            set found (string match -v -r -- '[.].' $found)
        end
    else
        switch (string split -m 1 = -- $word)[1]
@VALUES@
        end
        set found (string replace -r '[^=,]*$' '' -- $word)$found
    end
    string match -- "$word*" $found
end
complete -c errata -f -n 'count (__errata_words) >/dev/null' -a '(__errata_words)'
"""


def _filled(script: str, words: Words, line: Callable[[str, str, Iterable[str]], str]) -> str:
    """Return a script with its words.

    Args:
        script: The script with its place holders.
        words: What can be typed.
        line: Returns a branch of a `case`, from the variable that it sets, the name that it is for, and the words.
    """
    parts: tuple[tuple[str, Mapping[str, Iterable[str]]], ...] = (("names", words.names), ("values", words.values))
    for kind, found in parts:
        lines = [line(kind, name, choices) for name, choices in sorted(found.items())]
        script = script.replace(f"@{kind.upper()}@", "\n".join(lines))
    return script.replace("@COMMANDS@", " ".join(words.commands))


def bash(words: Words) -> str:
    """Return the script for bash 4 and newer."""
    return _filled(BASH, words, lambda kind, name, found: f"            {name}) {kind}='{' '.join(found)}' ;;")


def zsh(words: Words) -> str:
    """Return the script for zsh 5, to be sourced after compinit or put into a folder of $fpath as _errata."""
    return _filled(ZSH, words, lambda kind, name, found: f"            {name}) {kind}=({' '.join(found)}) ;;")


def fish(words: Words) -> str:
    """Return the script for fish 3."""
    return _filled(FISH, words, _fish_case)


def _fish_case(_: str, name: str, found: Iterable[str]) -> str:
    return f"            case {name}\n                set found {' '.join(found)}"


SHELLS: Mapping[str, Callable[[Words], str]] = MappingProxyType({"bash": bash, "zsh": zsh, "fish": fish})
