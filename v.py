exec(open('/tmp/m/t/feat.py').read().split("m=untrained")[0])
import torch.nn.functional as F
x=torch.from_numpy(I.copy()).float()[:,None]/255
for n in (4,8,16): score(F.adaptive_avg_pool2d(x,n).flatten(1).numpy(),f'thumb{n}')
