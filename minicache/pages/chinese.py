"""The Chinese of every text of the pages, by its English template. The command line stays English, and so do its messages."""

import re

from minicache.text import Phrase

HEADINGS = {
    "Summary": "概览",
    "Parts": "章节",
    "Rows to look at": "值得一看的行",
    "Lengths and logprobs": "长度与对数概率",
    "Which answers the reference prefers": "参考模型偏好哪个回答",
    "Extreme pairs": "极端的样本对",
    "Texts": "文本",
    "Files read": "读取的文件",
    "Manifest": "清单",
    "Curves": "曲线",
    "Held-out pairs": "留出的样本对",
    "Answers before and after": "训练前后的回答",
    "Options": "选项",
    "As a table": "以表格显示",
    "Whole prompt": "完整提示",
    "Before": "训练前",
    "After": "训练后",
    "{pairs:,} pairs scored by {model}": "{model} 打分的 {pairs:,} 个样本对",
    "{model} trained on {pairs:,} pairs": "{model} 在 {pairs:,} 个样本对上训练",
    "{model} in training": "{model} 训练中",
    "A policy": "策略模型",
}
STATES = {
    "Damaged: training refuses it. Run the same precompute-ref again to replace the damaged blocks.": (
        "已损坏：训练会拒绝它。再次运行同一条 precompute-ref 命令，即可替换损坏的块。"
    ),
    "Not complete: training refuses it. Run the same precompute-ref again to continue.": (
        "未完成：训练会拒绝它。再次运行同一条 precompute-ref 命令即可继续。"
    ),
    "Complete: training may use it.": "完整：可以用于训练。",
    "… and {more:,} more; inspect-cache --json lists all": "……还有 {more:,} 条；inspect-cache --json 会列出全部",
    "{pairs:,} pairs were not compared: {why}.": "{pairs:,} 个样本对没有比较：{why}。",
    "their blocks are damaged": "所在的块已损坏",
    "only the first {most:,} tokens of a cache are": "每个缓存只比较前 {most:,} 个 token",
    "Texts cannot be shown: {why}": "无法显示文本：{why}",
    "run.json is missing: the run's options are not known.": "缺少 run.json：不知道这次运行的选项。",
    "Not finished: last logged after step {step}. train --resume continues it.": (
        "未完成：最后一次记录在第 {step} 步之后。用 train --resume 继续。"
    ),
    "Stopped after step {step}: {why}.": "在第 {step} 步之后停止：{why}。",
    "Finished after step {step}.": "在第 {step} 步之后完成。",
    "{step:,} of {steps:,}": "{step:,}/{steps:,}",
    "The saved model is the best one, after step {kept:,}.": "保存的是最好的模型，即第 {kept:,} 步之后的。",
    "no lower validation loss in {waited} validations": "连续 {waited} 次验证，损失没有再降低",
    "the policy has moved {kl} nats per token from the reference, more than --max-kl {most}": (
        "策略模型已偏离参考模型 {kl} 奈特/token，超过 --max-kl {most}"
    ),
    "These answers are of {policy}, not of this run.": "这些回答来自 {policy}，不是这次运行的。",
    "Before: {reference}. After: {policy}.": "训练前：{reference}。训练后：{policy}。",
    "the reference": "参考模型",
    "the policy": "策略模型",
    "(no answer)": "（无回答）",
    "Cut at the longest length allowed.": "达到长度上限，被截断。",
    "{text} … {count:,} characters left out": "{text} ……省略 {count:,} 个字符",
    "The first {shown} of {all:,}.": "共 {all:,} 项，这里是前 {shown} 项。",
}
FACTS = {
    "pairs": "样本对",
    "blocks": "块",
    "tokens": "token 数",
    "on disk": "磁盘占用",
    "rows of the files": "文件中的行",
    "reference prefers chosen": "参考模型偏好 chosen",
    "mean margin": "平均间隔",
    "model": "模型",
    "scored in": "打分精度",
    "sides cut at": "每侧最长",
    "counted tokens": "计入的 token",
    "each token's logprob": "逐 token 对数概率",
    "block": "块大小",
    "date": "日期",
    "template args": "模板参数",
    "identity": "标识",
    "made": "创建",
    "started from": "起始模型",
    "reference cache": "参考缓存",
    "objective": "目标",
    "handshake": "一致性检查",
    "before the first step": "第一步之前",
    "{pairs:,}, of which {scored:,} scored": "{pairs:,}，其中 {scored:,} 个已打分",
    "{scored:,} of {blocks:,} finished": "{blocks:,} 块中完成 {scored:,} 块",
    "{tokens:,} stored, {chosen:,} counted in chosen, {rejected:,} in rejected": (
        "存储 {tokens:,} 个，chosen 计入 {chosen:,} 个，rejected 计入 {rejected:,} 个"
    ),
    "{truncated:,} truncated, {refused:,} refused": "截断 {truncated:,} 行，拒绝 {refused:,} 行",
    "{mean:.1%} of pairs by mean logprob, {sum:.1%} by sum": "按平均对数概率 {mean:.1%} 的样本对，按总和 {sum:.1%}",
    "{margin:+.4f} nats per token": "{margin:+.4f} 奈特/token",
    "{dtype}, {attention} attention": "{dtype}，{attention} 注意力",
    "{max_length:,} tokens, truncated on the {truncate}": "{max_length:,} 个 token，从{truncate}截断",
    "left": "左侧",
    "right": "右侧",
    "kept": "已保存",
    "not kept (--per-token)": "未保存（--per-token）",
    "{block_pairs:,} pairs": "{block_pairs:,} 个样本对",
    "{created} with {versions}": "{created}，使用 {versions}",
    "{pairs:,} trained on": "训练 {pairs:,} 个",
    "{pairs:,} trained on, {held_out:,} held out": "训练 {pairs:,} 个，留出 {held_out:,} 个",
    "held out, saved policy: {name}": "留出数据，保存的策略模型：{name}",
    "{loss} loss on {logps} logprobs, beta {beta}, lr {lr}": "{loss} 损失，{logps} 对数概率，beta {beta}，lr {lr}",
    "started from other weights: they differ from the cache by up to {worst:.2g} nats per token": (
        "从其他权重开始：与缓存最多相差 {worst:.2g} 奈特/token"
    ),
    "the policy reproduced the cache's logprobs within {worst:.1g} nats per token": (
        "策略模型重现了缓存中的对数概率，误差不超过 {worst:.1g} 奈特/token"
    ),
    "the policy reproduced the cache's logprobs exactly": "策略模型精确重现了缓存中的对数概率",
    "not logged": "没有记录",
    "loss {loss:.6f}, reward margin {margin:+.4f}": "损失 {loss:.6f}，奖励间隔 {margin:+.4f}",
    "loss {loss:.6f} (ln 2 is {ln_2:.6f}), reward margin {margin:+.4f}": (
        "损失 {loss:.6f}（ln 2 为 {ln_2:.6f}），奖励间隔 {margin:+.4f}"
    ),
    "{first} at step {begin:,}, {last} at step {end:,}": "第 {begin:,} 步 {first}，第 {end:,} 步 {last}",
}
TABLES = {
    "Tokens of the sides and their parts": "两侧及各部分的 token 数",
    "min": "最小",
    "median": "中位数",
    "mean": "平均",
    "p95": "95 百分位",
    "max": "最大",
    "shared beginning": "共同开头",
    "chosen": "chosen",
    "rejected": "rejected",
    "counted, chosen": "计入，chosen",
    "counted, rejected": "计入，rejected",
    "Prefers chosen, by {heading}": "偏好 chosen 的比例，按{heading}",
    "file": "文件",
    "longer answer": "较长回答的长度",
    "which answer is longer": "哪个回答更长",
    "neither": "一样长",
    "by mean": "按平均",
    "by sum": "按总和",
    "{low:,} to {high:,} tokens": "{low:,} 至 {high:,} 个 token",
    "{low:,} tokens and more": "{low:,} 个 token 及以上",
    "row": "行",
    "same as row": "对应的行",
    "found": "发现",
    "chosen nats": "chosen 奈特",
    "rejected nats": "rejected 奈特",
    "margin": "间隔",
    "shared tokens": "共同 token",
    "chosen tokens": "chosen token",
    "rejected tokens": "rejected token",
    "Reference prefers chosen most": "参考模型最偏好 chosen 的样本对",
    "Reference prefers rejected most": "参考模型最偏好 rejected 的样本对",
    "Least likely answers": "最不可能的回答",
    "Longest pairs": "最长的样本对",
    "Files": "文件",
    "rows": "行数",
    "duplicates": "重复",
    "truncated": "截断",
    "refused": "拒绝",
    "read to the end": "读到结尾",
    "yes": "是",
    "no": "否",
    "What was not used, and the like": "没有用到的内容等",
    "what": "内容",
    "Refused rows by reason": "被拒绝的行，按原因",
    "reason": "原因",
    "Refused rows, the first {count}": "被拒绝的行，前 {count} 行",
    "what was wrong": "问题",
    "Identity, field by field": "标识，逐字段",
    "field": "字段",
    "value": "值",
    "Held-out pairs, before and after": "留出的样本对，训练前后",
    "metric": "指标",
    "step {step:,}": "第 {step:,} 步",
    "step {step:,} (before)": "第 {step:,} 步（训练前）",
    "step {step:,} (saved)": "第 {step:,} 步（已保存）",
    "step {step:,} (before, and saved)": "第 {step:,} 步（训练前，也是保存的）",
    "Not the defaults": "非默认值",
    "Defaults": "默认值",
    "option": "选项",
    "Derived from the options": "由选项得出",
    "{count} options at their defaults": "{count} 个选项为默认值",
    "pair {number}": "样本对 {number}",
    "Pair {number}": "样本对 {number}",
}
ROWS = {
    "Contradicting labels": "相互矛盾的标签",
    "Two rows hold the same two answers to the same prompt, and each prefers the other one.": (
        "两行对同一提示有相同的两个回答，但偏好正好相反。"
    ),
    "Label perhaps flipped": "标签可能标反了",
    "The reference prefers rejected far more strongly than in other pairs: its margin lies "
    "{z} or more robust standard deviations (median, 1.4826 × MAD) below the median.": (
        "参考模型对 rejected 的偏好远强于其他样本对：间隔比中位数低 {z} 个以上的稳健标准差（中位数，1.4826 × MAD）。"
    ),
    "Nearly identical sides": "两侧几乎相同",
    "Apart from a common beginning and end, the sides differ in at most {share:.0%} of the longer answer's tokens.": (
        "除去共同的开头和结尾，两侧的差异不超过较长回答 token 数的 {share:.0%}。"
    ),
    "Near-duplicate answers": "近乎重复的回答",
    "Two rows whose counted tokens are almost the same: {agreeing} or more of {hashes} minhashes of their 4-token "
    "shingles agree. Pairs with fewer than {fewest} such shingles are not compared.": (
        "两行计入的 token 几乎相同：由 4 个 token 的片段算出的 {hashes} 个 minhash 中有 {agreeing} 个以上一致。"
        "少于 {fewest} 个片段的样本对不比较。"
    ),
    "None found by these rules:": "按以下规则没有发现问题：",
    "the same two answers, the other way round": "同样的两个回答，顺序相反",
    "1 token": "1 个 token",
    "{count:,} tokens": "{count:,} 个 token",
    "{tokens} of {counted:,} differ": "共 {counted:,} 个，其中 {tokens} 不同",
    "{score} of {hashes} hashes agree": "{hashes} 个哈希中 {score} 个一致",
    "margin {margin:+.2f}, {z:.1f} robust standard deviations below the median": (
        "间隔 {margin:+.2f}，比中位数低 {z:.1f} 个稳健标准差"
    ),
    "The share of pairs whose chosen answer the reference finds likelier, before any training. A sum favours the shorter answer; "
    "a mean depends less on length.": (
        "训练之前，参考模型认为 chosen 回答更可能的样本对所占比例。总和偏向较短的回答；平均受长度影响较小。"
    ),
    "Logprobs are means, in nats per token. The tokens of the shared beginning are counted apart from those of each side.": (
        "对数概率为平均值，单位是奈特/token。共同开头的 token 与各侧的 token 分开计数。"
    ),
    "Counted tokens are underlined and shaded by their logprob, in nats (a character of several tokens by their sum):": (
        "计入的 token 带下划线，并按对数概率（奈特）着色（由多个 token 组成的字按总和）："
    ),
    "above −0.1": "高于 −0.1",
    "to −0.7": "至 −0.7",
    "to −1.6": "至 −1.6",
    "to −3": "至 −3",
    "to −5": "至 −5",
    "to −8": "至 −8",
    "below": "更低",
    "Counted tokens are underlined. This cache holds only their mean logprob: made with precompute-ref --per-token, a cache "
    "holds each token's, and the page shades it.": (
        "计入的 token 带下划线。此缓存只有它们的平均对数概率："
        "用 precompute-ref --per-token 制作的缓存有每个 token 的值，页面会着色。"
    ),
    "special tokens": "特殊 token",
    "are framed; the same text typed in a row is not.": "带边框；数据行里写出的相同文字没有边框。",
    "Shared by both sides": "两侧共有",
    "Chosen: {mean}": "chosen：{mean}",
    "Rejected: {mean}": "rejected：{mean}",
    "{logp:.3f} nats per token": "{logp:.3f} 奈特/token",
    "not scored": "未打分",
    "{where}, margin {margin:+.3f}": "{where}，间隔 {margin:+.3f}",
    "The first {shown} of {all:,} files, here and in the preferences; inspect-cache --json lists all.": (
        "这里和偏好表中只列出 {all:,} 个文件中的前 {shown} 个；inspect-cache --json 会列出全部。"
    ),
    "All are listed in {file}.": "全部列在 {file} 中。",
    "What the values depend on: caches of one identity hold the same values for the same pairs.": (
        "数值取决于什么：标识相同的缓存，对相同的样本对保存相同的值。"
    ),
}
NOTES = {  # reports/notes.py
    "read with {options}": "读取时使用 {options}",
    "not used: {columns}": "未使用：{columns}",
    "{name} ({rows})": "{name}（{rows}）",
    "{count} more": "另外 {count} 个",
    "{count:,} rows": "{count:,} 行",
    "1 row": "1 行",
    "{rows}: the conversation's own system turn is used, not the system column": (
        "{rows}：使用对话自带的 system 轮次，而不是 system 列"
    ),
    "{rows}: the chat template leaves thoughts of earlier turns, or the text beside a call, out of the prompt": (
        "{rows}：对话模板不把较早轮次的思考，或工具调用旁的文字写入提示"
    ),
    "{rows}: their tools have no type and function around them, which most chat templates expect": (
        "{rows}：工具外面没有大多数对话模板需要的 type 和 function"
    ),
    "{rows}: answers that are equally good make no pair with each other": "{rows}：同样好的回答之间不组成样本对",
    "{rows}: both answers are marked unsafe; the more helpful one is preferred, as the data's authors do": (
        "{rows}：两个回答都标为不安全；与数据作者一样，偏好更有帮助的那个"
    ),
    "{rows} with the text of a special token, the first in {example}": "{rows}含有特殊 token 的文字，第一处在 {example}",
    "the contents look rendered: a chat template was applied to them before, and is now written around them once more. "
    "Give the texts without it; or, for texts as TRL joins them, see docs/trl.md, plain text": (
        "内容看来已经套用过对话模板，现在又套了一次。请给出未套模板的文本；如果是 TRL 拼接的纯文本，见 docs/trl.md"
    ),
}
CHARTS = {
    "Tokens of a side": "每侧的 token 数",
    "Reference's mean logprob": "参考模型的平均对数概率",
    "Reference's margin, chosen − rejected": "参考模型的间隔，chosen − rejected",
    "nats per token": "奈特/token",
    "nats per answer": "奈特/回答",
    "nats": "奈特",
    "share of pairs": "样本对的比例",
    "step": "步",
    "from {edge}": "从 {edge}",
    "Histogram of {pairs:,} pairs, from {first} to {last} {unit}; most in one bar: {most:,}.": (
        "{pairs:,} 个样本对的直方图，从 {first} 到 {last} {unit}；最高的一条有 {most:,} 个。"
    ),
    "Curve over steps {first:,} to {last:,}: {ends}.": "第 {first:,} 至 {last:,} 步的曲线：{ends}。",
    "{name} from {first:.4g} to {last:.4g}": "{name} 从 {first:.4g} 到 {last:.4g}",
    "The dashed line of the loss is ln 2: the policy is the reference.": "损失的虚线为 ln 2：策略模型就是参考模型。",
    "training": "训练",
    "held out": "留出",
    "{side}, held out": "{side}，留出",
    "Loss": "损失",
    "Reward margin": "奖励间隔",
    "Reward accuracy": "奖励准确率",
    "Rewards": "奖励",
    "Policy's logprobs": "策略模型的对数概率",
    "Moved from the reference (KL over tokens)": "偏离参考模型的程度（逐 token KL）",
    "Moved from the reference (KL of means)": "偏离参考模型的程度（均值 KL）",
    "Learning rate": "学习率",
    "Gradient norm, before clipping": "梯度范数（裁剪前）",
    "loss": "损失",
    "chosen is likelier": "chosen 更可能",
    "reward accuracy": "奖励准确率",
    "reward margin": "奖励间隔",
    "moved from the reference (k3 of means, at most k3 over tokens), nats per token": (
        "偏离参考模型（均值 k3，不大于逐 token 的），奈特/token"
    ),
    "moved from the reference (k3 over tokens), nats per token": "偏离参考模型（逐 token 的 k3），奈特/token",
}
WORDS = {  # reports/held_out.py
    "{reference:.1%} of {pairs:,} pairs, as by the reference": "{pairs:,} 个样本对的 {reference:.1%}，与参考模型相同",
    "{accuracy:.1%} of {pairs:,} pairs (95%: {accuracy_low:.1%} to {accuracy_high:.1%})": (
        "{pairs:,} 个样本对的 {accuracy:.1%}（95%：{accuracy_low:.1%} 至 {accuracy_high:.1%}）"
    ),
    "{margin:+.4f} (95%: {margin_low:+.4f} to {margin_high:+.4f})": "{margin:+.4f}（95%：{margin_low:+.4f} 至 {margin_high:+.4f}）",
    "{policy:.1%}, the reference {reference:.1%}: {gained:,} pairs gained, {lost:,} lost, p = {p}": (
        "{policy:.1%}，参考模型 {reference:.1%}：变对 {gained:,} 对，变错 {lost:,} 对，p = {p}"
    ),
    "below 0.0001": "小于 0.0001",
    "the model of --init-from": "--init-from 给出的模型",
    "no step was better than the start and it hardly moved: the saved policy is {start}; try a higher --lr, more --epochs": (
        "没有哪一步比起点更好，而且模型几乎没有变化：保存的策略模型就是{start}；请试更大的 --lr 或更多 --epochs"
    ),
    "no step was better than the start: the saved policy is {start}; try a lower --lr, a higher --beta, other pairs": (
        "没有哪一步比起点更好：保存的策略模型就是{start}；请试更小的 --lr、更大的 --beta 或别的数据"
    ),
    "reward accuracy in training, {trained:.0%}, is far above {held_out:.0%} on held-out pairs: it learned these "
    "pairs by heart; fewer --epochs, a lower --lr or more pairs": (
        "训练中的奖励准确率 {trained:.0%} 远高于留出数据的 {held_out:.0%}：模型把训练数据背了下来；"
        "请减少 --epochs、降低 --lr 或增加数据"
    ),
    "the policy has moved far, {distance:.1g} nats per token from the reference: read its answers (minidpo compare) "
    "before you use it; a lower --lr or a higher --beta keeps it closer": (
        "策略模型偏离参考模型很远（{distance:.1g} 奈特/token）：使用前请先读它的回答（minidpo compare）；"
        "更小的 --lr 或更大的 --beta 会让它更接近参考模型"
    ),
    "the policy hardly moved, {distance:.1g} nats per token from the reference: {advice}": (
        "策略模型几乎没有变化，只偏离参考模型 {distance:.1g} 奈特/token：{advice}"
    ),
    "the policy has the reference's own weights: nothing was learned": "策略模型的权重与参考模型完全相同：什么也没有学到",
    "try a higher --lr": "请试更大的 --lr",
    "about --lr {better:.0e} would move it visibly": "--lr 约为 {better:.0e} 时会有明显变化",
    "{pairs:,} held-out pairs are too few to tell whether the policy got better: its accuracy may be "
    "{accuracy_low:.0%} or {accuracy_high:.0%}": (
        "{pairs:,} 个留出的样本对太少，看不出策略模型是否变好：准确率可能是 {accuracy_low:.0%}，也可能是 {accuracy_high:.0%}"
    ),
    "the policy prefers the rejected answers: it got worse on held-out pairs; look at the data and at --lr": (
        "策略模型偏好 rejected 回答：在留出数据上变差了；请检查数据和 --lr"
    ),
}
SCRIPT = {  # report.js, which puts the value in itself
    " … {value} tokens left out … ": " ……省略 {value} 个 token…… ",
    "special token": "特殊 token",
    "{value} nats": "{value} 奈特",
    "Least likely: {value}": "最不可能的：{value}",
}
CHINESE = {**HEADINGS, **STATES, **FACTS, **TABLES, **ROWS, **NOTES, **CHARTS, **WORDS}
FIELD = re.compile(r"\{\w+[^}]*\}")


def chinese(text: str) -> str | None:
    """The Chinese of one of this program's texts, its values in Chinese too; None where there is none."""
    if not isinstance(text, Phrase):
        return CHINESE.get(text)
    # a list of values, or a number, reads the same
    wordless = bool(text.values) and not re.search(r"\w", FIELD.sub("", text.template))
    found = text.template if wordless else CHINESE.get(text.template)
    if found is None or not text.values:
        return found
    return found.format(**{name: _value(value) for name, value in text.values.items()})


def _value(value: object) -> object:
    return (chinese(value) or value) if isinstance(value, Phrase) else value
